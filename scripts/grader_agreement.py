"""Agreement with the test cases of public graders: ours, math-verify alone, and others on the same cases.

    python scripts/grader_agreement.py            # tables and disagreements of docs/evidence/grading.md

Takes about three minutes of one processor core. The cases, their sources and their licenses are in
tests/evaluate/benchmarks/.
"""

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from math_verify import StringExtractionConfig, parse, verify

from hpd.evaluate.benchmarks.choices import chosen_letter
from hpd.evaluate.benchmarks.grading import grade_texts, reference_answer

CASES = Path(__file__).resolve().parents[1] / "tests/evaluate/benchmarks/agreement.jsonl"
OTHERS = CASES.with_name("other_graders.json")
_SECONDS = 60  # of parsing and of comparing: a busy machine must not change the figures


class Case(NamedTuple):
    """One case of a suite; see the README beside the cases."""

    suite: str
    form: str
    gold: str
    text: str
    right: bool
    who: str = ""
    why: str = ""


def read_cases(path: Path = CASES) -> list[Case]:
    with path.open(encoding="utf-8") as lines:
        return [Case(**json.loads(line)) for line in lines]


def our_verdicts(cases: Sequence[Case]) -> list[bool]:
    """As `hpd eval` grades: an answer alone in a box."""
    answers = [case for case in cases if case.form != "letter"]
    texts = [f"\\boxed{{{case.text}}}" if case.form == "answer" else case.text for case in answers]
    verdicts = iter(grade_texts(texts, [reference_answer(case.gold) for case in answers]))
    return [
        chosen_letter(case.text) == case.gold if case.form == "letter" else next(verdicts).correct
        for case in cases
    ]


def verdicts_of_math_verify(cases: Sequence[Case]) -> list[bool]:
    """math-verify with its defaults: an answer alone as a formula, letters by its string extraction."""
    logging.disable(logging.CRITICAL)
    return [_math_verify(case) for case in cases]


def _math_verify(case: Case) -> bool:
    gold, text = case.gold, case.text
    if case.form == "letter":
        letters = [StringExtractionConfig(strings=("A", "B", "C", "D"))]
        return verify(parse(gold, letters), parse(text, letters), timeout_seconds=_SECONDS)
    if case.form == "answer":
        gold, text = f"${gold}$", f"${text}$"
    parsed = [parse(side, parsing_timeout=_SECONDS) for side in (gold, text)]
    return bool(verify(*parsed, timeout_seconds=_SECONDS))


def table(cases: Sequence[Case], ours: Sequence[bool], theirs: Sequence[bool]) -> str:
    lines = ["| suite | cases | hpd | math-verify alone | hpd, undisputed | math-verify alone, undisputed |"]
    lines.append("|---|---|---|---|---|---|")
    for suite in [*dict.fromkeys(case.suite for case in cases), "all"]:
        chosen = [index for index, case in enumerate(cases) if suite in (case.suite, "all")]
        counts = [agreeing(cases, verdicts, chosen) for verdicts in (ours, theirs)]
        plain = [index for index in chosen if not is_disputed(cases[index])]
        undisputed = [f"{agreeing(cases, verdicts, plain)} of {len(plain)}" for verdicts in (ours, theirs)]
        lines.append(f"| {suite} | {len(chosen)} | {counts[0]} | {counts[1]} | {' | '.join(undisputed)} |")
    return "\n".join(lines)


def agreeing(cases: Sequence[Case], verdicts: Sequence[bool], chosen: Sequence[int]) -> int:
    """How many of the chosen cases have the suite's verdict."""
    return sum(verdicts[index] == cases[index].right for index in chosen)


def is_disputed(case: Case) -> bool:
    """True where the suite's verdict is not the right one."""
    return case.who == "hpd"


def other_graders(path: Path = OTHERS) -> dict[str, list[bool | None]]:
    """Verdicts of graders that are no dependency, by name; None where a case is not for the grader."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return {name: [None if bit == "-" else bit == "1" for bit in bits] for name, bits in found.items()}


def table_of_others(cases: Sequence[Case]) -> str:
    """Each of the other graders on the cases that it is for, beside ours, which differs where it is said."""
    ours = [case.right != bool(case.why) for case in cases]
    lines = ["| grader | cases that it is for | it | hpd | it, undisputed | hpd, undisputed |"]
    lines.append("|---|---|---|---|---|---|")
    for name, verdicts in other_graders().items():
        chosen = [index for index, verdict in enumerate(verdicts) if verdict is not None]
        plain = [index for index in chosen if not is_disputed(cases[index])]
        both = [[bool(verdict) for verdict in verdicts], ours]
        counts = [str(agreeing(cases, found, chosen)) for found in both]
        counts += [f"{agreeing(cases, found, plain)} of {len(plain)}" for found in both]
        lines.append(f"| {name} | {len(chosen)} | {' | '.join(counts)} |")
    return "\n".join(lines)


def disagreements(cases: Sequence[Case]) -> str:
    """The cases that are marked as disagreements, alike ones of several suites in one line."""
    lines = ["| suite | reference | answer | its verdict | who is right |", "|---|---|---|---|---|"]
    rows: dict[tuple[str, ...], list[str]] = {}
    for case in cases:
        if case.why:
            verdict = "right" if case.right else "wrong"
            key = (_cell(case.gold), _cell(case.text), verdict, f"{case.who}: {case.why}")
            rows.setdefault(key, []).append(case.suite)
    lines += [f"| {', '.join(suites)} | {' | '.join(key)} |" for key, suites in rows.items()]
    return "\n".join(lines)


def _cell(text: str) -> str:
    short = re.sub(r"\s", " ", text if len(text) <= 90 else "..." + text[-87:])
    return "`" + short.replace("|", r"\|") + "`"


def main() -> None:
    cases = read_cases()
    agreement = table(cases, our_verdicts(cases), verdicts_of_math_verify(cases))
    for text in (agreement, table_of_others(cases), disagreements(cases)):
        print(text, end="\n\n")


if __name__ == "__main__":
    main()
