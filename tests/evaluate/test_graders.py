"""Grading of real answers: where the final one is, what equals what, which option is chosen.

The cases are those of shared/cases/graders.jsonl and relatives of them.
"""

import time

import pytest

from hpd.evaluate.benchmarks.answers import drop_thinking, final_answer
from hpd.evaluate.benchmarks.choices import chosen_letter
from hpd.evaluate.benchmarks.grading import grade_texts

GIVEN = [
    ("20", "#### Step 1\n10 + 10 = 20\n\n#### Step 2: conclusion\n\\[\\boxed{20}\\]", True),
    ("20", "\\boxed{20}\n\n#### Explanation\nBecause 10 + 10 = 20.", True),
    ("20", "#### Step 3: Total\n18 + 2 = 20\n\nSo the total is **20**.", True),
    ("20", "#### Final Answer\n\n**20 dollars**", True),
    ("5", "<think>maybe \\boxed{3}</think>\nThe answer is 5.", True),
    ("1\\frac{4}{5}", "So \\boxed{\\frac{9}{5}}.", True),
    ("1\\frac{4}{5}", "So \\boxed{1.8}.", True),
    ("10.5", "So \\boxed{2\\frac{1}{2}}.", False),
    ("\\frac{33}{4}", "So \\boxed{3\\frac{3}{4}}.", False),
    ("137 \\frac{1}{2}", "So \\boxed{137.5}.", True),
    ("90^\\circ", "So \\boxed{90\\text{ degrees}}.", True),
    ("4\\text{ inches}", "So \\boxed{4 inch}.", True),
    ("5 m", "So \\boxed{5 km}.", False),
    ("\\frac{270}7\\text{ degrees}", "So \\boxed{\\frac{270}{7}^\\circ}.", True),
    ("\\frac{1}{2004!}", "So \\boxed{\\frac{1}{2006!}}.", False),
    ("\\frac{1}{2^{30}}", "So \\boxed{0}.", False),
    ("\\frac{2^{2005}+1}{3 \\cdot 2^{2006}}", "So \\boxed{\\frac{1}{3 \\cdot 2^{2006}}}.", False),
    ("1, 2, \\ldots, n", "So \\boxed{1, 3, 5, \\ldots, 2n-1}.", False),
    ("4210_{5}", "So \\boxed{4210_{6}}.", False),
    ("0.\\overline{3}", "So \\boxed{\\frac{1}{3}}.", True),
    ("\\emptyset", "So \\boxed{\\varnothing}.", True),
    ("f(x) = 0", "So \\boxed{\\forall x>0, f(x) = 0}.", False),
    ("\\cos 60^\\circ", "So \\boxed{1/2}.", True),
    ("3,000,000", "So \\boxed{3\\text{ million}}.", True),
    ("20", "The answer is about 20.", True),
    ("20", "The answer is therefore 20 apples.", True),
    ("20", "Answer: Let's think step by step. 4*5 = 20. She has 20 apples left.", True),
    ("3.5", "Therefore, she needs 3 1/2 cups", True),
    ("1000000", "Total: 1 000 000", True),
    ("29", "So \\boxed{\\$29.00}.", True),
    ("\\frac12", "So \\boxed{\\frac{1}{2}}.", True),
    ("(1,\\frac{9}{2})", "So \\boxed{(1,4.5)}.", True),
    ("\\pm 2021", "So \\boxed{2021}.", False),
    ("12:00", "So \\boxed{1:00}.", False),
    ("19, 46, \\text{ and } 82", "So \\boxed{21, 36, and 82}.", False),
    ("3x-1y+13=0", "So \\boxed{3x + 4y + 14=0}.", False),
    ("1 - \\frac{1}{\\mathrm{e}}", "So \\boxed{1 + \\frac{1}{\\mathrm{e}}}.", False),
    ("33.3", "So \\boxed{\\frac{100}{3}}.", False),
    ("x \\in [-2,7]", "So \\boxed{[-2,7]}.", True),
    ("1,2", "So \\boxed{2,1}.", True),
    ("(1,2)", "So \\boxed{(2,1)}.", False),
    ("18", "The answer is 18.\n#### 18", True),
    ("42", "Thus the answer is \\[ \\boxed{42} \\]", True),
]

RELATED = [
    # headings, markers and drafts
    ("20", "### Step 1\n#### 1. Add\n10 + 10 = 20\n\\[\\boxed{20}\\]", True),
    ("20", "#### Conclusion\n\nShe has 20 apples.", True),
    ("7", "#### Answer\n\n7", True),
    ("7", "#### Final Answer: 7", True),
    ("20", "The answer is\n\n$$20$$\n", True),
    ("20", "Answer: We add 4 and 16. So she has 20 apples.", True),
    ("72", "The answer is 72. I hope this answer is clear!", True),
    ("72", "The answer is 72. The final answer is correct.", True),
    ("42", "The answer is \\boxed{42", False),
    ("42", "<think>\\boxed{42}", False),
    ("42", "<think>the answer is 42", False),
    ("42", "maybe 41</think>The answer is 42", True),
    ("3", "<think>The answer is 3.</think>The answer is 5.", False),
    ("5", "<thinking>3</thinking> \\boxed{5}", True),
    # prose
    ("20", "The answer is approximately 20.", True),
    ("20", "The answer is: about 20 apples", True),
    ("80", "The answer is 40 * 2 = 80 dollars.", True),
    ("20", "The answer is that she has 20 apples.", True),
    ("20", "Final answer: she has 20 apples left.", True),
    ("Paris", "The answer is Paris.", True),
    ("Paris", "The answer is London.", False),
    ("3", "The answer is three.", True),
    ("silent", "\\boxed{listen}", False),
    ("\\text{even}", "\\boxed{\\text{Even}}", True),
    ("east", "\\boxed{\\text{west}}", False),
    ("11", "The answer is 11 (eleven).", True),
    ("8", "Therefore 8 is the answer.", True),
    ("Yes", "Yes, it is.", True),
    ("Yes", "No, it is not.", False),
    # what stands around an answer
    ("5", "Answer: **5** ✅", True),
    ("5", "#### 5 ✔️", True),
    ("45", "The answer is 45° 🎉", True),
    ("5", "Answer = 5 ∎", True),
    ("5", "Final answer\n---\n**5**", True),
    ("5", "The answer is 5, not 6.", True),
    ("6", "The answer is 5, not 6.", False),
    ("5", "The answer is 5 (not 6).", True),
    ("5", "The answer is 5 — not 6.", True),
    ("5", "The answer is 5 rather than 6.", True),
    ("5", "The answer is 5 → done", True),
    ("5", "Therefore the answer is 5 (confidence: 90%).", True),
    ("2 \\pmod 5", "The answer is 2 (mod 6)", False),
    ("5", '{"answer": 5, "confidence": 0.9}', True),
    ("0.9", '{"answer": 5, "confidence": 0.9}', False),
    # numbers
    ("2.5", "So she needs 2½ cups.", True),
    ("2.5", "She needs 2 ½ cups", True),
    ("2.5", "So she needs 2⅖ cups.", False),
    ("0.75", "So ¾ of them.", True),
    ("0.625", "\\boxed{⅝}", True),
    ("25", "The answer is twenty-five.", True),
    ("25", "\\boxed{\\text{twenty five}}", True),
    ("26", "The answer is twenty-five.", False),
    ("1\\frac{1}{4}", "\\boxed{\\frac54}", True),
    ("\\frac{5}{4}", "\\boxed{1 1/4}", True),
    ("\\frac{14}{5}", "\\boxed{1\\frac{4}{5}}", False),
    ("-1.5", "\\boxed{-1\\frac{1}{2}}", True),
    ("1234567", "\\boxed{1\u202f234\u202f567}", True),
    ("1234567", "\\boxed{1\u00a0234\u00a0567}", True),
    ("1234567", "\\boxed{1\\,234\\,567}", True),
    ("-3", "\\boxed{\u20133}", True),
    ("3.5", "\\boxed{3,5}", True),
    ("1234.5", "\\boxed{1.234,5}", True),
    ("0.1\\overline{6}", "\\boxed{\\frac16}", True),
    ("0.\\overline{3}", "\\boxed{0.3}", False),
    ("\\frac{1}{3}", "\\boxed{0.(3)}", True),
    # multiples
    ("12", "The answer is 12 M.", False),
    ("12", "The answer is 12 lakh.", False),
    ("12", "The answer is 12 thousand.", False),
    ("12", "They earned 12 thousand", False),
    ("1200000", "\\boxed{12 \\text{ lakh}}", True),
    ("1.5 million", "\\boxed{1,500,000}", True),
    ("24", "\\boxed{2 \\text{ dozen}}", True),
    # units
    ("90", "\\boxed{90^\\circ}", True),
    ("10\\%", "The answer is 10 percent.", True),
    ("10 percent", "\\boxed{10\\%}", True),
    ("10 percent", "\\boxed{11\\%}", False),
    ("6\\text{ feet}", "\\boxed{6\\text{ foot}}", True),
    ("2 hours", "\\boxed{2\\text{ minutes}}", False),
    ("2 hours", "\\boxed{2\\text{ hrs}}", True),
    ("\\$5", "\\boxed{5 \\text{ cents}}", False),
    ("16\\text{ cm}^2", "\\boxed{16\\text{ square centimeters}}", True),
    ("5\\sqrt{2}\\text{ m}", "\\boxed{5\\sqrt{2}\\text{ km}}", False),
    ("5\\sqrt{2}\\text{ m}", "\\boxed{\\sqrt{50}}", True),
    ("\\sin 30^\\circ", "\\boxed{\\frac12}", True),
    # decimals against exact values
    ("\\frac{1}{12}", "\\boxed{0.0833333333333333}", True),
    ("\\frac{1}{3}", "\\boxed{0.33}", False),
    ("\\frac{\\sqrt2}{2}", "\\boxed{0.70710678}", True),
    ("\\frac{\\sqrt2}{2}", "\\boxed{0.707}", False),
    ("\\frac{\\sqrt2}{2}", "\\boxed{0.70710679}", False),
    ("\\pi", "\\boxed{3.14}", False),
    ("1/2^99", "\\boxed{1/2^98}", False),
    ("\\frac{1}{2^{30}}", "\\boxed{0.000000}", False),
    ("\\frac{1}{3^{40}}", "\\boxed{\\frac{1}{3^{41}}}", False),
    ("2^{-30}", "\\boxed{\\frac{1}{2^{30}}}", True),
    # bases, lists, relations
    ("1010_2", "\\boxed{1010_{2}}", True),
    ("1010_2", "\\boxed{1010_{3}}", False),
    ("A2_{16}", "\\boxed{A2_{15}}", False),
    ("2, 4, 6, \\ldots", "\\boxed{2, 4, 8, \\ldots}", False),
    ("1, 2, 3, \\dots", "\\boxed{1, 2, 3, \\ldots}", True),
    ("1, 2, \\ldots, 100", "\\boxed{1}", False),
    ("\\pm 3", "\\boxed{3, -3}", True),
    ("\\pm 3", "\\boxed{-3 \\text{ or } 3}", True),
    ("1 \\pm \\sqrt2", "\\boxed{1-\\sqrt{2}, 1+\\sqrt{2}}", True),
    ("4", "\\boxed{x=4}", True),
    ("2,1", "so $x = \\boxed{1}$ or $x = \\boxed{2}$.", True),
    ("4", "so \\boxed{3} or \\boxed{4}", False),
    ("-2,1", "\\boxed{x=-2 \\text{ or } x=1}", True),
    ("a=1, b=2", "\\boxed{b=2, a=1}", True),
    ("a=1, b=2", "\\boxed{a=2, b=1}", False),
    ("\\{1,2\\}", "\\boxed{\\{2,1\\}}", True),
    ("[1,2]", "\\boxed{[2,1]}", False),
    ("(1/2^{40}, 1)", "\\boxed{(1/2^{41}, 1)}", False),
    ("x > 0", "\\boxed{x < 0}", False),
    ("6:30", "\\boxed{3:15}", False),
    ("2:30", "\\boxed{2:30 \\text{ p.m.}}", True),
    ("x^2+2x+1", "\\boxed{(x+1)^2}", True),
    ("\\frac{\\sqrt2}2", "\\boxed{\\frac{1}{\\sqrt{2}}}", True),
    ("\\varnothing", "\\boxed{∅}", True),
    ("2\\sqrt{3}", "\\boxed{2√3}", True),
    ("1 - \\frac{1}{\\mathrm{e}}", "\\boxed{1 - \\frac1e}", True),
    # a sentence behind a marker, a number in bold, percent in prose, thousands by apostrophes
    ("9", "Answer: Okay, let me work this out. 3 times 3 is 9.", True),
    ("9", "Answer: Okay, let me work this out. 3 times 3 is 8.", False),
    ("366", "The total is 60 + 180 + 126 = **366** downloads over 3 months", True),
    ("3", "The total is 60 + 180 + 126 = **366** downloads over 3 months", False),
    ("\\text{Tuesday}", "The day is **Tuesday**.", True),
    ("0.5", "The probability is 50%.", True),
    ("0.05", "The probability is 50%.", False),
    ("1234", "The answer is 1\u2019234.", True),
    ("234", "In total 1'234 people", False),
    # units of symbols, speeds
    ("24\\pi \\text{ cm}^3", "\\boxed{24\\pi\\text{ cubic centimeters}}", True),
    ("24\\pi \\text{ cm}^3", "\\boxed{24\\pi\\text{ cm}^2}", False),
    ("24\\pi \\text{ cm}^3", "\\boxed{25\\pi\\text{ cm}^3}", False),
    ("25\\text{ mph}", "\\boxed{25 \\text{ miles per hour}}", True),
    ("25\\text{ mph}", "\\boxed{25 \\text{ km/h}}", False),
    ("30\\text{ km/h}", "\\boxed{30\\ \\text{km per hour}}", True),
    # digits that repeat, bases in words, colors
    ("0.\\dot{3}", "\\boxed{\\frac13}", True),
    ("\\frac{41}{333}", "\\boxed{0.\\dot{1}2\\dot{3}}", True),
    ("0.1666...", "\\boxed{\\frac16}", True),
    ("0.1666...", "\\boxed{\\frac{1666}{10000}}", False),
    ("1101_2", "\\boxed{1101_{\\text{two}}}", True),
    ("1101_2", "\\boxed{1101_{\\text{three}}}", False),
    ("10", "\\boxed{\\textcolor{red}{10}}", True),
    ("13", "\\boxed{\\underline{13}}", True),
    # where it holds
    ("f(x)=2x", "\\boxed{f(x)=2x \\text{ for all real } x}", True),
    ("f(x)=2x", "\\boxed{f(x)=2x \\text{ for all } x > 0}", False),
    ("\\mathbb{R}", "\\boxed{\\text{all real numbers}}", True),
    ("\\mathbb{R}", "\\boxed{\\text{all real numbers except } 0}", False),
    ("(-\\infty,-1)\\cup(1,\\infty)", "\\boxed{x<-1 \\text{ or } x>1}", True),
    ("(-\\infty,-1]\\cup(1,\\infty)", "\\boxed{x<-1 \\text{ or } x>1}", False),
    ("(-\\infty,-\\frac12]\\cup[3,\\infty)", "\\boxed{x\\le -\\frac{1}{2} \\text{ or } x\\geq 3}", True),
]


def _wrong(cases):
    verdicts = grade_texts([text for _, text, _ in cases], [gold for gold, _, _ in cases])
    return [
        (case, verdict) for case, verdict in zip(cases, verdicts, strict=True) if verdict.correct != case[2]
    ]


def test_every_given_case_is_graded_right():
    assert not _wrong(GIVEN)


def test_related_cases_are_graded_right():
    assert not _wrong(RELATED)


def test_thoughts_are_no_answer():
    assert drop_thinking("<think>a</think>b<think>c") == "b"
    assert final_answer("<think>it is \\boxed{3}") is None
    assert final_answer("a draft 3 [/THINK] 5") == "5"


@pytest.mark.parametrize(
    "text",
    [
        "<think>" * 20_000,
        "\\(" * 64_000,
        "$" * 50_001,
        "\\boxed{1}, " * 10_000,
        "#### a\n" * 20_000,
        "answer is so " * 20_000,
        "1 000 " * 30_000,
        "0." * 50_000,
        "answer of " * 20_000,
    ],
)
def test_looping_answers_cost_one_pass(text):
    start = time.perf_counter()
    grade_texts([text], ["Paris"])
    chosen_letter(text)
    assert time.perf_counter() - start < 10


CHOICES = [
    ("\\boxed{\\mathrm{B}}", "B"),
    ("\\boxed{\\text{Option B}}", "B"),
    ("I choose B, not A", "B"),
    ("The answer is therefore B.", "B"),
    ("Thus it is C. A proton has charge.", "C"),
    ("The correct answer is option (C).", "C"),
    ("<think>the answer is A? hmm</think>\nC", "C"),
    ("**B**", "B"),
    ("(B)", "B"),
    ("B) 5 m/s", "B"),
    ("Answer: B. because A is wrong", "B"),
    ("The correct option is B", "B"),
    ("B is correct", "B"),
    ("Option B is the correct one; A and C fail.", "B"),
    ("A is wrong, so D.", "D"),
    ("It is not A but B.", "B"),
    ("Answer - B", "B"),
    ("\\boxed{B. 5 m/s}", "B"),
    ("\\boxed{(B)}", "B"),
    ("#### B", "B"),
    ("Answer: \\(\\boxed{B}\\)", "B"),
    ("Answer: $B$", "B"),
    ("answer: b", "B"),
    ("The answer is C) foo", "C"),
    ("Final answer: **C**", "C"),
    ("Both A and B are wrong; C", "C"),
    ("\\boxed{\\textbf{(B)}}", "B"),
    ("Choice C", "C"),
    ("[B]", "B"),
    ("The best answer is B", "B"),
    ("I would go with B", "B"),
    ("B.", "B"),
    ("#### A closer look\nSo \\boxed{C}", "C"),
    ("Answer: a lot", None),
    ("none", None),
    ("Therefore, the answer is D because A is not stable.", "D"),
    ("The answer is (d).", "D"),
    ("$\\boxed{\\textbf{D}}$", "D"),
    ("**Answer: C**", "C"),
    ("Answer:\n\nB", "B"),
    ("The answer is: **(A)**", "A"),
    ("A", "A"),
    ("The answer is A.", "A"),
    ("I think the answer is a proton, so B", "B"),
    ("Let's see. A ball is thrown. So it must be D", "D"),
    ("So the answer is \\(\\mathbf{A}\\).", "A"),
    ("Options A and B can be eliminated. Hence C.", "C"),
    ("The correct choice would be D.", "D"),
    ("The answer cannot be B. The answer is A", "A"),
    ("Of A, B, C and D, only D works", "D"),
    ("The right answer is **B) 3.2 eV**.", "B"),
    ("My choice: C", "C"),
    ("Correct answer: C: 5", "C"),
    ("The answer is not A. It is C.", "C"),
    ("\\boxed{A}", "A"),
    ("\\boxed{\\text{(C) } 3}", "C"),
    ("\\boxed{A \\text{ or } B}", None),
    ("<think>so it's B", None),
    ("D", "D"),
    ("Final Answer: The final answer is $\\boxed{A}$. I hope it is correct.", "A"),
    ("Answer: The answer is A, since a boson ...", "A"),
    ("C - because", "C"),
    ("In conclusion, option C.", "C"),
    ("The letter is B", "B"),
    ("Hence, (B) is the right answer, while (C) is not.", "B"),
    ("B, not C", "B"),
    ("The correct answer is **B. 10 N**, not **A. 5 N**.", "B"),
    ("We pick option A.", "A"),
    ("Answer is C", "C"),
    ("ANSWER: C", "C"),
    ("The Answer Is C", "C"),
    ("Thus, C is the correct answer.", "C"),
    ("the answer:c", "C"),
    ("The answer is $\\text{B}$.", "B"),
    ("选 B", "B"),
    ("Vitamin C is high, so the answer is D", "D"),
    ("<answer>B</answer>", "B"),
    ("The answer is either A or B.", None),
    ("It is either A or B; the answer is B.", "B"),
]


@pytest.mark.parametrize(("text", "letter"), CHOICES)
def test_the_chosen_option(text, letter):
    assert chosen_letter(text) == letter
