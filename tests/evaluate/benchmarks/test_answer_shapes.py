"""Three hundred shapes of answers as models write them; the rules behind the verdicts are in
docs/evidence/grading.md, "Math: what counts as right"."""

import pytest

from hpd.evaluate.benchmarks.grading import grade_texts, reference_answer

# Reference -> (texts that give it, texts that give something else).
SHAPES: dict[str, dict[str, tuple[list[str], list[str]]]] = {
    "thousands": {
        "1234567": (
            [
                r"\boxed{1,234,567}",
                r"\boxed{1{,}234{,}567}",
                r"\boxed{1\,234\,567}",
                r"\boxed{1\;234\;567}",
                r"\boxed{1,\!234,\!567}",
                "\\boxed{1\u00a0234\u00a0567}",
                "\\boxed{1\u202f234\u202f567}",
                "\\boxed{1\u2009234\u2009567}",
                r"\boxed{1~234~567}",
                "The answer is 1,234,567.",
                "The total is **1,234,567**.",
                "Total: 1 234 567",
                "#### 1,234,567",
                "The answer is $1,234,567$.",
                r"Thus $x = 1{,}234{,}567$.",
                r"\boxed{1234567.00}",
                r"\boxed{+1234567}",
                r"\boxed{1.234567 \times 10^6}",
                r"\boxed{1.234567\cdot10^{6}}",
            ],
            [
                r"\boxed{1,234,568}",
                r"\boxed{1.234567}",
                r"\boxed{1,234}",
                "The answer is 234,567.",
                r"\boxed{12,34,567.5}",
                r"\boxed{1.234567 \times 10^7}",
            ],
        ),
        "0.125": (
            [
                r"\boxed{.125}",
                r"\boxed{0,125}",
                r"\boxed{\frac18}",
                r"\boxed{1/8}",
                r"\boxed{12.5\%}",
                r"\boxed{0.1250}",
                r"\boxed{2^{-3}}",
                "The answer is 0,125.",
            ],
            [r"\boxed{125}", r"\boxed{0.13}", r"\boxed{1.25}", r"\boxed{0,0125}", r"\boxed{8}"],
        ),
        "3.5": (
            [r"\boxed{3,5}", r"\boxed{3\frac12}", r"\boxed{3 1/2}", r"\boxed{7/2}", "So it takes 3,5 hours."],
            [r"\boxed{35}", r"\boxed{3, 5}", r"\boxed{5}", r"\boxed{31/2}"],
        ),
        "1234.5": ([r"\boxed{1.234,5}", r"\boxed{1 234,5}", r"\boxed{1,234.5}"], [r"\boxed{1.2345}"]),
    },
    "signs": {
        "-7": (
            [
                r"\boxed{-7}",
                "\\boxed{\u22127}",
                "\\boxed{\u20137}",
                r"\boxed{- 7}",
                r"\boxed{{-}7}",
                "The answer is \u22127.",
                "The answer is \u20137.",
                "So the temperature is -7 degrees.",
                r"\boxed{x=-7}",
                r"\boxed{-7.0}",
            ],
            [r"\boxed{7}", r"\boxed{\pm7}", r"\boxed{--7}", r"\boxed{7-}"],
        ),
        r"\pm 3": (
            [
                r"\boxed{3, -3}",
                r"\boxed{-3 \text{ or } 3}",
                r"\boxed{x=\pm3}",
                r"$x = 3$ or $x = -3$",
                "\\boxed{±3}",
            ],
            [r"\boxed{3}", r"\boxed{-3}", r"\boxed{3, 3}"],
        ),
    },
    "units": {
        "12": (
            [
                r"\boxed{12\text{ cm}}",
                r"\boxed{12\,\mathrm{km/h}}",
                r"\boxed{12 \text{ apples}}",
                r"\boxed{12^\circ}",
                r"\boxed{12\%}",
                r"\boxed{\$12}",
                r"\boxed{12\text{ dollars}}",
                r"\boxed{12\text{ cm}^2}",
                r"\boxed{12 \text{ square units}}",
                "The answer is 12 apples.",
                "The answer is 12cm.",
                "He pays $12.00.",
                "She needs 12 of them, so the answer is 12.",
                "The answer is twelve.",
                "The answer is: **12**",
                "**Answer:** 12",
                "Answer: 12 (twelve)",
                r"The answer is \( 12 \).",
                "12",
                "12.",
                "Final Answer: 12 days",
                r"\boxed{12days}",
            ],
            [
                "The answer is 12 M.",
                "The answer is 12 million.",
                "The answer is 12 lakh.",
                "The answer is 12 thousand.",
                r"\boxed{12k}",
                r"\boxed{12x}",
                r"\boxed{12!}",
                r"\boxed{12^2}",
                r"\boxed{12\text{ dozen}}",
                r"\boxed{1\frac12}",
                r"\boxed{12i}",
                r"\boxed{12\pi}",
                "The answer is 12/5.",
                "The answer is not 12 but 13.",
            ],
        ),
        "12 million": (
            [
                r"\boxed{12,000,000}",
                "The answer is 12 M.",
                r"\boxed{12\times 10^6}",
                r"\boxed{1.2\times10^7}",
            ],
            [r"\boxed{12}", r"\boxed{12\text{ thousand}}", r"\boxed{12\text{ billion}}"],
        ),
        r"45^\circ": (
            [
                r"\boxed{45}",
                r"\boxed{45\text{ degrees}}",
                r"\boxed{45°}",
                r"\boxed{45\degree}",
                r"\boxed{45^{\circ}}",
            ],
            [r"\boxed{54^\circ}", r"\boxed{45\text{ rad}}", r"\boxed{\frac{\pi}{4}^\circ}"],
        ),
        r"25\%": (
            [
                r"\boxed{25}",
                r"\boxed{25\%}",
                r"\boxed{0.25}",
                r"\boxed{\frac14}",
                "25 percent",
                "It is 25 %.",
            ],
            [r"\boxed{2.5\%}", r"\boxed{0.25\%}", r"\boxed{75\%}"],
        ),
        r"\$18.90": (
            [
                r"\boxed{18.90}",
                r"\boxed{\$18.9}",
                r"\boxed{18.90\text{ dollars}}",
                "She pays $18.90.",
                r"\boxed{18{,}90}",
            ],
            [r"\boxed{18.90\text{ cents}}", r"\boxed{1890}", r"\boxed{\$18}"],
        ),
        "5 km": (
            [r"\boxed{5\text{ km}}", r"\boxed{5\text{ kilometers}}", r"\boxed{5}", "5 kilometres"],
            [r"\boxed{5\text{ m}}", r"\boxed{5\text{ miles}}", r"\boxed{50\text{ km}}"],
        ),
        r"16\text{ cm}^2": (
            [r"\boxed{16}", r"\boxed{16\,\text{cm}^2}", r"\boxed{16\text{ square centimeters}}"],
            [r"\boxed{16\text{ cm}^3}", r"\boxed{16\text{ m}^2}"],
        ),
        "2 hours": (
            [r"\boxed{2\text{ h}}", r"\boxed{2 \text{ hours}}"],
            [r"\boxed{2\text{ minutes}}", r"\boxed{20}"],
        ),
        "3:45": (
            [r"\boxed{3:45}", r"\boxed{3:45\text{ p.m.}}", r"\boxed{03:45}", r"\boxed{3:45:00}"],
            [r"\boxed{4:15}", r"\boxed{3:54}", r"\boxed{345}"],
        ),
        "15:45": (
            [r"\boxed{3:45\text{ p.m.}}", r"\boxed{15:45}"],
            [r"\boxed{3:45\text{ a.m.}}", r"\boxed{3:45}"],
        ),
    },
    "fractions": {
        r"\frac{7}{4}": (
            [
                r"\boxed{7/4}",
                r"\boxed{\dfrac74}",
                r"\boxed{\tfrac{7}{4}}",
                r"\boxed{1\frac{3}{4}}",
                r"\boxed{1 3/4}",
                r"\boxed{1.75}",
                r"\boxed{\frac{14}{8}}",
                r"\boxed{\frac{-7}{-4}}",
                r"\boxed{\left(\frac{7}{4}\right)}",
                r"The answer is \frac{7}{4}.",
                r"The answer is $\frac{7}{4}$ of the cake.",
                "The answer is 1 3/4 cups.",
                "So he eats 7/4",
                r"$$\boxed{\frac{7}{4}}$$",
            ],
            [
                r"\boxed{\frac47}",
                r"\boxed{13/4}",
                r"\boxed{1.74}",
                r"\boxed{-\frac74}",
                r"\boxed{\frac{7}{4}x}",
                r"\boxed{74}",
            ],
        ),
        r"\frac{1}{3}": (
            [
                r"\boxed{0.\overline{3}}",
                r"\boxed{0.333333}",
                r"\boxed{0.(3)}",
                r"\boxed{3^{-1}}",
                "\\boxed{⅓}",
            ],
            [r"\boxed{0.33}", r"\boxed{0.3}", r"\boxed{0.333334}", r"\boxed{33\%}"],
        ),
    },
    "lists": {
        "1, 2, 3": (
            [
                r"\boxed{3, 2, 1}",
                r"\boxed{\{1, 2, 3\}}",
                r"\boxed{1, 2 \text{ and } 3}",
                r"\boxed{1}, \boxed{2}, \boxed{3}",
                r"\boxed{1}, \boxed{2} and \boxed{3}",
                r"\boxed{x = 1, 2, 3}",
                r"\boxed{1;2;3}",
                r"$\boxed{1},\ \boxed{2},\ \text{and } \boxed{3}$",
                "The answers are 1, 2, 3.",
                "The answer is $1$, $2$, and $3$.",
            ],
            [
                r"\boxed{1, 2}",
                r"\boxed{1, 2, 4}",
                r"\boxed{123}",
                r"\boxed{1, 2, 3, 4}",
                r"\boxed{6}",
                r"\boxed{3}",
            ],
        ),
        "(3, -2)": (
            [
                r"\boxed{(3,-2)}",
                r"\boxed{\left(3, -2\right)}",
                r"\boxed{(x,y)=(3,-2)}",
                r"\boxed{x=3, y=-2}",
                "\\boxed{(3, \u22122)}",
                "The answer is (3, -2).",
                r"\boxed{(3.0,\,-\frac{4}{2})}",
            ],
            [
                r"\boxed{(-2,3)}",
                r"\boxed{(3,2)}",
                r"\boxed{x=-2, y=3}",
                r"\boxed{(-2,3)\text{ and }(3,2)}",
                r"\boxed{(3,-2,0)}",
                r"\boxed{3}",
            ],
        ),
        "(1,2), (2,1)": (
            [r"\boxed{(2,1), (1,2)}", r"\boxed{(1,2) \text{ and } (2,1)}"],
            [r"\boxed{(1,2)}", r"\boxed{(1,2),(1,1)}"],
        ),
        r"[0, 5)": (
            [r"\boxed{[0,5)}", r"\boxed{0\le x<5}", r"\boxed{x\in[0,5)}", r"\boxed{\left[0,5\right)}"],
            [r"\boxed{(0,5)}", r"\boxed{[0,5]}", r"\boxed{0<x<5}", r"\boxed{[5,0)}"],
        ),
        r"(-\infty,1)\cup(4,\infty)": (
            [
                r"\boxed{(-\infty, 1) \cup (4, \infty)}",
                r"\boxed{(4,+\infty)\cup(-\infty,1)}",
                "\\boxed{(-∞, 1) ∪ (4, ∞)}",
            ],
            [r"\boxed{(-\infty,1]\cup[4,\infty)}", r"\boxed{(1,4)}", r"\boxed{(-\infty,1)}"],
        ),
        r"x > 3": (
            [r"\boxed{x>3}", r"\boxed{3<x}", r"\boxed{(3,\infty)}"],
            [r"\boxed{x\ge3}", r"\boxed{x<3}", r"\boxed{3}"],
        ),
        r"\emptyset": (
            [r"\boxed{\varnothing}", "\\boxed{∅}", r"\boxed{\{\}}"],
            [r"\boxed{0}", r"\boxed{\{0\}}"],
        ),
        r"p=5,q=2;p=7,q=2": (
            [r"\boxed{(5,2),(7,2)}", r"\boxed{p=7,q=2;p=5,q=2}"],
            [r"\boxed{(2,5),(2,7)}", r"\boxed{p=5,q=7;p=7,q=2}"],
        ),
    },
    "matrices": {
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}": (
            [
                r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}",
                r"\boxed{\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}}",
                r"\boxed{\left[\begin{array}{cc}1&2\\3&4\end{array}\right]}",
                r"\boxed{\begin{pmatrix}1&2\\3&\frac{8}{2}\end{pmatrix}}",
            ],
            [
                r"\boxed{\begin{pmatrix}1&3\\2&4\end{pmatrix}}",
                r"\boxed{\begin{pmatrix}1&2\end{pmatrix}}",
                r"\boxed{-2}",
            ],
        )
    },
    "expressions": {
        "x^2-4": (
            [
                r"\boxed{(x-2)(x+2)}",
                r"\boxed{x^2 - 4}",
                r"\boxed{-4+x^2}",
                r"\boxed{f(x)=x^2-4}",
                "\\boxed{x² − 4}",
                r"$y = x^{2}-4$",
            ],
            [r"\boxed{x^2+4}", r"\boxed{(x-2)^2}", r"\boxed{4-x^2}", r"\boxed{y^2-4}"],
        ),
        r"2\sqrt{3}": (
            [
                r"\boxed{\sqrt{12}}",
                r"\boxed{2 \sqrt 3}",
                "\\boxed{2√3}",
                r"\boxed{\frac{6}{\sqrt{3}}}",
                r"\boxed{3.464102}",
            ],
            [r"\boxed{3.46}", r"\boxed{3\sqrt2}", r"\boxed{\sqrt{6}}", r"\boxed{2\sqrt{3}i}"],
        ),
        r"4\pi": (
            [r"\boxed{4 \pi}", "\\boxed{4π}", r"\boxed{\pi\cdot4}", r"\boxed{12.566371}"],
            [r"\boxed{12.57}", r"\boxed{4}"],
        ),
        "3+4i": ([r"\boxed{4i+3}", r"\boxed{3 + 4 i}"], [r"\boxed{3-4i}", r"\boxed{4+3i}", r"\boxed{7}"]),
        "2^{10}": (
            [r"\boxed{1024}", r"\boxed{1{,}024}", r"\boxed{4^5}"],
            [r"\boxed{20}", r"\boxed{2^{11}}", r"\boxed{210}"],
        ),
        "101_2": (
            [r"\boxed{101_2}", r"\boxed{101_{2}}", r"\boxed{101}"],
            [r"\boxed{101_3}", r"\boxed{110_2}", r"\boxed{5}"],
        ),
        "6!": ([r"\boxed{720}"], [r"\boxed{6}", r"\boxed{5!}"]),
        r"y = 2x + 1": (
            [r"\boxed{y=2x+1}", r"\boxed{y = 1 + 2x}", r"\boxed{2x+1}"],
            [r"\boxed{y=2x-1}", r"\boxed{x=2y+1}"],
        ),
    },
    "words": {
        "Saturday": (
            [
                r"\boxed{\text{Saturday}}",
                r"\boxed{saturday}",
                "The answer is Saturday.",
                "**Saturday**",
                r"\boxed{\textbf{Saturday}}",
            ],
            [r"\boxed{\text{Sunday}}", "The answer is not Saturday.", r"\boxed{6}"],
        ),
        "Yes": (
            [r"\boxed{\text{Yes}}", "Yes, because 4 is even.", "The answer is yes."],
            [r"\boxed{\text{No}}", "No."],
        ),
        r"\text{(C)}": (
            [r"\boxed{\text{(C)}}", r"\boxed{C}", r"\boxed{\textbf{(C)}}"],
            [r"\boxed{\text{(D)}}", r"\boxed{B}"],
        ),
    },
    "places": {
        "42": (
            [
                r"First \boxed{40}. Adding 2 gives \boxed{42}.",
                "<think>maybe \\boxed{41}</think>The answer is \\boxed{42}.",
                "\\boxed{42}\n\n#### Check\n40 + 2 = 42, not 43.",
                "<answer>42</answer>",
                "<think>It is 41.</think><answer> 42 </answer>",
                "The answer is 42. I hope this answer is clear!",
                "Final Answer: The largest $n$ is 42.",
                "#### 42",
                "40 + 2 = 42",
                r"\fbox{42}",
                r"\boxed 42",
                r"\boxed{\boxed{42}}",
                "The answer is:\n\n42",
                "### Answer\n42",
                "So we have 42 apples in total.",
                r"\[ \boxed{42} \]",
                r"$\boxed{\text{42}}$",
                r"He makes \boxed{40} first. The final answer is $42$.",
                "\\boxed{42 was meant to be a box.\n#### 42",
            ],
            [
                r"The answer is \boxed{42",
                r"\boxed{42}. Let me check: \boxed{4",
                r"\boxed{42} and \boxed{42",
                r"The answer is 42. Once more: \boxed{\frac{84}{",
                r"It is 42, that is $42$. So \boxed",
                "<think>The answer is 42.",
                r"\boxed{42}. Wait, that is wrong. \boxed{43}",
                "The answer is 420.",
                "The answer is 4 2 apples and 2 pears",
                r"\boxed{}",
                "",
                "I do not know.",
                "The answer lies between 41 and 43.",
                r"\boxed{x_{42}}",
                r"\boxed{42, 43}",
                r"\boxed{\text{about } 41}",
            ],
        )
    },
}
CASES = [
    (group, gold, text, right)
    for group, references in SHAPES.items()
    for gold, sides in references.items()
    for right, texts in zip((True, False), sides, strict=True)
    for text in texts
]


@pytest.mark.parametrize("group", SHAPES)
def test_shapes_of_answers(group):
    cases = [case for case in CASES if case[0] == group]
    verdicts = grade_texts(
        [text for _, _, text, _ in cases], [reference_answer(gold) for _, gold, _, _ in cases]
    )
    wrong = [
        (gold, text, f"want {right}", verdict.detail, verdict.extracted)
        for (_, gold, text, right), verdict in zip(cases, verdicts, strict=True)
        if verdict.correct != right
    ]
    assert not wrong


def test_there_are_three_hundred():
    assert len(set(CASES)) == len(CASES) >= 300
