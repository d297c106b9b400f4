"""Verdicts of graders that are no dependency of this package, on the test cases of public suites.

    pip install 'lm-eval[math]' pylatexenc     # in an environment of its own: its antlr4 is an older one
    git clone https://github.com/openai/prm800k
    python scripts/other_graders.py prm800k

writes `tests/evaluate/benchmarks/other_graders.json`, of which `scripts/grader_agreement.py` makes a table.
"""

import importlib.metadata
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.filters.extraction import RegexFilter
from lm_eval.tasks.hendrycks_math import utils as hendrycks
from lm_eval.tasks.minerva_math import utils as minerva

# Of processor time, so that a busy machine changes no verdict; minerva_math's own limit goes by the clock.
_SECONDS = 5

TESTS = Path(__file__).resolve().parents[1] / "tests/evaluate/benchmarks"
_NUMBER = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?")

Case = dict[str, Any]
Grader = Callable[[Case], bool | None]
"""A verdict; None where the grader is not for such a case."""


def gold_of(case: Case) -> str:
    """The reference as these graders take it: out of its box and its dollar signs."""
    gold = case["gold"]
    if r"\boxed{" in gold and (boxed := minerva.last_boxed_only_string(gold)):
        return minerva.remove_boxed(boxed)
    return gold.strip().strip("$").strip()


def minerva_math(case: Case) -> bool | None:
    """As the task: what "Final Answer: The final answer is" says, normalized, by sympy's difference."""
    text = case["text"] if case["form"] == "answer" else minerva.get_unnormalized_answer(case["text"])
    return minerva.is_equiv(*map(minerva.normalize_final_answer, (text, gold_of(case))))


def hendrycks_math(case: Case) -> bool | None:
    """As the task: what is between the first and the last dollar sign, as a normalized text."""
    row = {"solution": rf"\boxed{{{gold_of(case)}}}"}
    return bool(hendrycks.process_results(row, [case["text"]])["exact_match"])


def gsm8k(name: str) -> Grader:
    """One of the task's two filters and its exact match, where the reference is a number."""
    task = yaml.safe_load((Path(minerva.__file__).parents[1] / "gsm8k/gsm8k.yaml").read_text("utf-8"))
    (rules,) = (entry["filter"] for entry in task["filter_list"] if entry["name"] == name)
    chosen = RegexFilter(**{key: value for key, value in rules[0].items() if key != "function"})
    (metric,) = task["metric_list"]
    ignored = {key: metric[key] for key in ("regexes_to_ignore", "ignore_case", "ignore_punctuation")}

    def grade(case: Case) -> bool | None:
        gold = gold_of(case)
        if not _NUMBER.fullmatch(gold):
            return None
        text = case["text"]
        if case["form"] == "answer" and name == "strict-match":
            text = f"#### {text}"
        ((found,),) = chosen.apply([[text]], [{}])
        return bool(exact_match_hf_evaluate([found], [gold], **ignored)["exact_match"])

    return grade


def prm800k(folder: Path) -> Grader:
    """PRM800K's comparison, which is of answers alone: it has no rule for finding them in a text."""
    sys.path.insert(0, str(folder / "prm800k"))
    from grading.grader import grade_answer

    return lambda case: bool(grade_answer(case["text"], gold_of(case))) if case["form"] == "answer" else None


def verdicts(grader: Grader, cases: Sequence[Case]) -> str:
    """1 right, 0 wrong, - not for this grader; an error and too long a time are wrong."""
    return "".join("-" if found is None else str(int(found)) for found in map(_bounded(grader), cases))


@contextmanager
def processor_time(seconds: float = _SECONDS, error_message: str = "") -> Iterator[None]:
    """Raises TimeoutError after so many seconds of processor time."""

    def late(*_: object) -> None:
        raise TimeoutError(error_message)

    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _bounded(grader: Grader) -> Grader:
    def grade(case: Case) -> bool | None:
        if case["form"] == "letter":
            return None
        try:
            # minerva_math sets the timer itself, around its comparison.
            with nullcontext() if grader is minerva_math else processor_time():
                return grader(case)
        except Exception as error:
            print(f"{type(error).__name__} on {case['gold'][-60:]!r}", file=sys.stderr)
            return False

    return grade


def main() -> None:
    lines = (TESTS / "agreement.jsonl").read_text("utf-8").split("\n")
    cases = [json.loads(line) for line in lines if line]
    version = importlib.metadata.version("lm_eval")
    minerva.timeout = processor_time
    graders = {
        f"lm-eval {version} hendrycks_math": hendrycks_math,
        f"lm-eval {version} gsm8k, strict": gsm8k("strict-match"),
        f"lm-eval {version} gsm8k, flexible": gsm8k("flexible-extract"),
        "PRM800K": prm800k(Path(sys.argv[1])),
        f"lm-eval {version} minerva_math": minerva_math,
    }
    found: dict[str, str] = {}
    for name, grader in graders.items():
        found[name] = verdicts(grader, cases)
        print(f"{name}: {found[name].count('1')} right, {found[name].count('0')} wrong", flush=True)
        (TESTS / "other_graders.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
