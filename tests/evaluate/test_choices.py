"""The letter that a text on a multiple-choice question chooses: forms that models and people write."""

import time

import pytest

from hpd.evaluate.benchmarks.choices import chosen_letter

FORMS = [
    (r"\boxed{B}", "B"),
    (r"\boxed{B}, the answer is B. Or rather \boxed{C", None),
    ("\\boxed{B was meant to be a box.\nThe answer is C.", "C"),
    (r"So the answer is $\boxed{\text{B}}$.", "B"),
    (r"\boxed{\mathrm{B}}", "B"),
    (r"Thus \(\boxed{\text{Option B}}\)", "B"),
    (r"\boxed{(B)}", "B"),
    (r"\boxed{\textbf{(B)}~12}", "B"),
    (r"\boxed{\text{B) } 3.2 \times 10^{-4}}", "B"),
    (r"\boxed{B: the larger one}", "B"),
    ("B", "B"),
    ("b", "B"),
    ("(B)", "B"),
    ("B.", "B"),
    ("**B**", "B"),
    ("B) The reaction is exothermic", "B"),
    ("Answer: B", "B"),
    ("**Answer:** B", "B"),
    ("**Answer: B**", "B"),
    ("Answer: (b)", "B"),
    ("ANSWER: B", "B"),
    ("The answer is B.", "B"),
    ("The answer is (B).", "B"),
    ("The correct answer is **B**.", "B"),
    ("The correct answer is option B.", "B"),
    ("The correct option is: B) 4 m/s", "B"),
    ("The final answer is $B$.", "B"),
    (r"The answer is $\mathbf{B}$.", "B"),
    ("Therefore, the best choice is B.", "B"),
    ("I choose B, not A.", "B"),
    ("I would go with B.", "B"),
    ("I pick option B because A is too small.", "B"),
    ("Option B is correct.", "B"),
    ("B is the correct answer.", "B"),
    ("So, (B) is right.", "B"),
    ("A, C and D are wrong, so it must be B.", "B"),
    ("It can't be A or C. That leaves B.", "B"),
    ("A is wrong. C is wrong. D is wrong. B remains.", "B"),
    ("Not A. Not C. B.", "B"),
    ("Option A fails the test, whereas B passes it. Hence B.", "B"),
    ("At first I thought A, but the answer is B", "B"),
    ("The answer is A. Wait, no: the answer is B.", "B"),
    ("#### B", "B"),
    ("## Final answer\nB", "B"),
    ("The answer is:\n\n**B**", "B"),
    ("Let me think.\n\nAnswer\nB", "B"),
    ("My answer: B – since energy is conserved.", "B"),
    ("Correct answer → B", "B"),
    ("Choice: B", "B"),
    ("[[B]]", "B"),
    ("<answer>B</answer>", "B"),
    ("<think>It may be A or C.</think>B", "B"),
    ("<think>It may be A", None),
    ("A man walks into a bar. The answer is B.", "B"),
    ("A good way to see it: the answer is B.", "B"),
    ("Vitamin C is acidic, so the answer is B.", "B"),
    ("The force on body A equals that on body C. Answer: B", "B"),
    (r"\boxed{A} or \boxed{B}", None),
    (r"\boxed{A, B}", None),
    ("I do not know.", None),
    ("", None),
    ("None of the options is right.", None),
    ("Final Answer: The final answer is $\\boxed{B}$. I hope it is correct.", "B"),
    ("Answer: B\n\nExplanation: A is too small, C is too large, and D has the wrong unit.", "B"),
    ("The answer is B, which is larger than A.", "B"),
    ("We can eliminate A and D. Between B and C, B is better. So B.", "B"),
    ("```\nB\n```", "B"),
    ('{"answer": "B"}', "B"),
    ("- [ ] A\n- [x] B\n- [ ] C", "B"),
    ("☐ A) 3\n☑ B) 4\n☐ C) 5", "B"),
    ("- [x] A\n- [x] B\n\nThe answer is B.", "B"),
    ("- [x] A is positive\n- [ ] B is even\n\nThe answer is C.", "C"),
    ("✅ B is plausible, ❌ A is not.\n\n\\boxed{C}", "C"),
    ("❌ A\n✅ B\n❌ C", "B"),
    ("The answer is Ｃ.", "C"),
]


@pytest.mark.parametrize(("text", "letter"), FORMS)
def test_forms(text, letter):
    assert chosen_letter(text) == letter


@pytest.mark.parametrize(
    "text", ["\n" * 32_000, "✅\n" * 20_000, "- [x] \n- [ ] \n" * 10_000, "[x]" * 20_000]
)
def test_texts_of_a_looping_model_take_no_time(text):
    started = time.process_time()
    assert chosen_letter(text) is None
    assert time.process_time() - started < 1
