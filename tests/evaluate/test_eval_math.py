"""Math grading: equal and different answers, the rules of each benchmark, the reference evaluation's files,
GSM8K."""

import gzip
import json
import time
from pathlib import Path

import pytest

from hpd.evaluate import Answer, make_task
from hpd.evaluate.benchmarks.answers import last_math, split_answers
from hpd.evaluate.benchmarks.gpqa import Gpqa, chosen_letter
from hpd.evaluate.benchmarks.verifier import AnswerPair, compare_all


def _write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _check(path: Path, name: str, *cases: tuple[dict, list[str], list[str]], **options) -> None:
    """Right and wrong answers to problems, all graded in one call."""
    task = make_task(name, _write(path / "cases.jsonl", *[row for row, _, _ in cases]), **options)
    graded = [
        (example, text, text in right)
        for example, (_, right, wrong) in zip(task.examples(), cases, strict=True)
        for text in [*right, *wrong]
    ]
    verdicts = task.grade([example for example, _, _ in graded], [Answer(text=text) for _, text, _ in graded])
    for (example, text, expected), verdict in zip(graded, verdicts, strict=True):
        assert verdict.correct is expected, (example.answer, text, verdict)


def test_expressions_that_are_equal_and_expressions_that_are_not(tmp_path):
    cases = {
        r"\frac{\sqrt{3}}{2}": (
            [r"\boxed{\dfrac{\sqrt 3}{2}}", r"\boxed{\sqrt{3/4}}", r"so $\frac12\sqrt{3}$."],
            [r"\boxed{\frac{3}{2}}"],
        ),
        "p - q": ([r"\boxed{-q + p}"], [r"\boxed{q - p}"]),
        r"\left( 3, \frac{\pi}{2} \right)": ([r"\boxed{(3, \pi/2)}"], [r"\boxed{(\pi/2, 3)}", r"\boxed{3}"]),
        r"(-\infty, 2)": ([r"\boxed{(-\infty,2)}"], [r"\boxed{[-\infty,2]}"]),
        "1024": (
            [r"\boxed{2^{10}}", r"\boxed{1,024}", r"The answer is $2^{10}$."],
            [r"\boxed{1023}", "no idea"],
        ),
        r"11\sqrt2": ([r"\boxed{\sqrt{242}}"], [r"\boxed{11}"]),
    }
    _check(
        tmp_path,
        "math500",
        *[({"problem": "?", "answer": answer}, *texts) for answer, texts in cases.items()],
    )


def test_a_comparison_that_would_never_end_is_killed_and_the_next_one_works():
    endless = AnswerPair("1", r"9^{9^{9^{9}}}")
    start = time.perf_counter()
    outcomes = compare_all(
        [endless, AnswerPair("2x", "x + x"), AnswerPair("x", r"\frac{"), AnswerPair("1/3", r"\frac{2}{6}")],
        3.0,
    )
    assert time.perf_counter() - start < 60
    assert not outcomes[endless].same
    assert {
        comparison.gold: outcome.same for comparison, outcome in outcomes.items() if comparison != endless
    } == {
        "2x": True,
        "x": False,
        "1/3": True,
    }


def test_answers_in_lists():
    assert split_answers(r"$(0,2)$, $(0,-2)$ and $3$") == ["(0,2)", "(0,-2)", "3"]
    assert split_answers(r"\{1, \frac{1}{2}; 3\}") == ["1", r"\frac{1}{2}", "3"]
    assert split_answers("5") == ["5"]
    assert last_math("so $x = 1$, that is $y = x + 1$.") == "y = x + 1"
    assert last_math("so $x = 1$, that is 2.") is None


def _olympiad(*answers: str, multiple: bool = False, error: str | None = None) -> dict:
    return {
        "question": "?",
        "context": "Let x = 1.",
        "final_answer": list(answers),
        "is_multiple_answer": multiple,
        "error": error,
    }


def test_olympiadbench_takes_several_answers_in_any_order_and_its_own_tolerance(tmp_path):
    _check(
        tmp_path,
        "olympiadbench",
        (
            _olympiad(r"$1+\sqrt{2}, 1-\sqrt{2}$,$3$", multiple=True),
            [r"\boxed{3, 1-\sqrt2, 1+\sqrt2}", r"\boxed{3}, \boxed{1+\sqrt{2}} and \boxed{1-\sqrt{2}}"],
            [r"\boxed{3, 1+\sqrt2}", r"\boxed{3, 3, 1+\sqrt2}", r"\boxed{3, 1-\sqrt2, 1+\sqrt2, 0}"],
        ),
        (_olympiad("4.2", error="1e-1"), [r"\boxed{4.25}", r"\boxed{\frac{21}{5}}"], [r"\boxed{4.4}"]),
        (_olympiad("4.2"), [r"\boxed{4.2}"], [r"\boxed{4.25}"]),
        (_olympiad("2,400, 1350", multiple=True), [r"\boxed{1350, 2400}"], [r"\boxed{2, 400}"]),
    )
    task = make_task("olympiadbench", tmp_path / "cases.jsonl", limit=1)
    assert task.examples()[0].prompt == "Let x = 1.\n\n?"


def test_minerva_numbers_have_a_tolerance_and_expressions_have_none(tmp_path):
    cases = {
        "4.5e33": ([r"\boxed{4.49 \times 10^{33}}", r"\boxed{4.5e33}"], [r"\boxed{4.6 \times 10^{33}}"]),
        "np.arcsin(10/13)": ([r"\boxed{0.8776}"], [r"\boxed{0.9}"]),
        "-3./2": ([r"\boxed{-1.5}"], [r"\boxed{1.5}"]),
        r"\frac{e^{t}}{3}": ([r"\boxed{e^t/3}"], [r"\boxed{e^{t}/3.01}"]),
    }
    _check(
        tmp_path,
        "minerva",
        *[({"problem": "?", "answer": answer}, *texts) for answer, texts in cases.items()],
    )
    strict = {"problem": "?", "answer": "200"}
    _check(tmp_path, "minerva", (strict, [r"\boxed{200}"], [r"\boxed{201}"]), tolerance=0.0)
    _check(tmp_path, "minerva", (strict, [r"\boxed{201}"], [r"\boxed{203}"]))


def test_columns_of_the_small_benchmarks(tmp_path):
    svamp = {"ID": "chal-1", "Body": "There are 87 oranges", "Question": "How many?", "Answer": 145.0}
    (example,) = make_task("svamp", _write(tmp_path / "s.jsonl", svamp)).examples()
    assert (example.id, example.prompt, example.answer) == (
        "chal-1",
        "There are 87 oranges. How many?",
        "145",
    )
    (example,) = make_task(
        "mawps", _write(tmp_path / "m.jsonl", {"input": "2 more?", "target": 1.5})
    ).examples()
    assert (example.prompt, example.answer) == ("2 more?", "1.5")
    (example,) = make_task(
        "gsm8k", _write(tmp_path / "g.jsonl", {"question": "a", "answer": "1+1=<<1+1=2>>2\n#### 2"})
    ).examples()
    assert (example.answer, example.solution) == ("2", "1+1=2\n#### 2")
    with pytest.raises(ValueError, match="has no answer"):
        make_task("gsm8k", _write(tmp_path / "g.jsonl", {"question": "a"}))


GPQA = {
    "Question": "Which?",
    "Correct Answer": "right",
    "Incorrect Answer 1": "w1",
    "Incorrect Answer 2": "w2",
    "Incorrect Answer 3": "w3",
}


def test_gpqa_options_are_shuffled_by_seed_and_graded_by_letter(tmp_path):
    path = _write(tmp_path / "gpqa.jsonl", *[{**GPQA, "Record ID": f"r{index}"} for index in range(40)])
    task, again, other = Gpqa(path), Gpqa(path), Gpqa(path, shuffle_seed=1)
    examples = task.examples()
    assert (
        [e.prompt for e in examples]
        == [e.prompt for e in again.examples()]
        != [e.prompt for e in other.examples()]
    )
    assert {example.answer for example in examples} == set("ABCD")
    assert all(f"{example.answer}) right" in example.prompt for example in examples)
    first = examples[0]
    wrong = next(letter for letter in "ABCD" if letter != first.answer)
    texts = [
        rf"so \boxed{{{first.answer}}}",
        f"{wrong} is wrong. The answer is ({first.answer}).",
        rf"\boxed{{{wrong}}}",
        "none",
    ]
    verdicts = task.grade([first] * 4, [Answer(text=text) for text in texts])
    assert [v.correct for v in verdicts] == [True, True, False, False]
    assert [
        chosen_letter(text)
        for text in (r"\boxed{\text{B}}", "Answer: (c)", "A is wrong, so D.", "Answer: a lot")
    ] == [
        "B",
        "C",
        "D",
        None,
    ]
    with pytest.raises(ValueError, match="lacks Incorrect Answer 3"):
        Gpqa(_write(tmp_path / "bad.jsonl", {**GPQA, "Incorrect Answer 3": ""}))


def test_files_of_the_reference_evaluation_repeat_problems_as_samples(shared):
    for name, file, copies in (
        ("math500", "upstream_math500", 8),
        ("aime24", "upstream_aime-24", 32),
        ("minerva", "upstream_minerva", 8),
    ):
        upstream = make_task(name, shared / "data" / name / f"{file}.parquet")
        local = make_task(name, shared / "data")
        assert [(e.prompt, e.answer) for e in upstream.examples()] == [
            (e.prompt, e.answer) for e in local.examples()
        ]
        assert (
            upstream.defaults["num_samples"],
            upstream.defaults["temperature"],
            upstream.defaults["top_p"],
        ) == (
            copies,
            0.7,
            0.95,
        )
        assert upstream.defaults["system_prompt"] == local.defaults["system_prompt"]
        assert len(make_task(name, shared / "data" / name / f"{file}.parquet", limit=3).examples()) == 3


def test_unequal_repetitions_are_an_error(tmp_path):
    row = {"prompt": [{"role": "user", "content": "a"}], "reward_model": {"ground_truth": "1"}}
    other = {"prompt": [{"role": "user", "content": "b"}], "reward_model": {"ground_truth": "1"}}
    with pytest.raises(ValueError, match="repeats its problems 1 to 2 times"):
        make_task("math500", _write(tmp_path / "u.jsonl", row, row, other))


def test_gsm8k_verdicts_of_stored_model_samples(shared):
    """2,640 samples of four models with the verdicts that came with them."""
    task = make_task("gsm8k", shared / "data")
    examples = {example.prompt: example for example in task.examples()}
    with gzip.open(
        shared / "data" / "gsm8k" / "example_model_solutions_even.jsonl.gz", "rt", encoding="utf-8"
    ) as file:
        rows = [json.loads(line) for line in file]
    models = [key for key in rows[0] if isinstance(rows[0][key], dict)]
    samples = [(examples[row["question"].strip()], row[model]) for row in rows for model in models]
    verdicts = task.grade(
        [example for example, _ in samples], [Answer(text=sample["solution"]) for _, sample in samples]
    )
    differing = [
        (example.id, verdict.extracted)
        for (example, sample), verdict in zip(samples, verdicts, strict=True)
        if verdict.correct != sample["is_correct"]
    ]
    assert (len(samples), len(models)) == (2640, 4)
    assert sum(sample["is_correct"] for _, sample in samples) == 986
    assert not differing  # docs/evidence/grading.md says so


@pytest.mark.parametrize(
    "name",
    [
        "gsm8k",
        "aime24",
        "svamp",
        "mawps",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("math500", "olympiadbench", "minerva")),
    ],
)
def test_boxed_references_are_right_and_those_of_the_next_problem_are_not(shared, name):
    task = make_task(name, shared / "data", limit=40)
    examples = task.examples()
    boxed = [Answer(text=rf"Thus \boxed{{{example.answer.replace('$', '')}}}.") for example in examples]
    assert all(verdict.correct for verdict in task.grade(examples, boxed))
    shifted = task.grade(examples, [*boxed[1:], boxed[0]])
    assert sum(bool(verdict.correct) for verdict in shifted) <= 4  # equal by chance
