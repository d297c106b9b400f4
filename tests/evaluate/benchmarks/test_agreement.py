"""Agreement with the test cases of public graders (README.md beside this file)."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("grader_agreement", ROOT / "scripts/grader_agreement.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["grader_agreement"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def graded(script):
    cases = script.read_cases()
    return cases, script.our_verdicts(cases)


def test_every_disagreement_is_listed_with_who_is_right(script):
    cases = script.read_cases()
    page = (ROOT / "docs/evidence/grading.md").read_text("utf-8")
    assert script.disagreements(cases) in page
    assert {case.who for case in cases if case.why} <= {"hpd", "suite", "by rule"}


def test_other_graders_have_a_verdict_on_every_case_that_is_for_them(script):
    cases = script.read_cases()
    for name, verdicts in script.other_graders().items():
        assert len(verdicts) == len(cases), name
        letters = [verdict for verdict, case in zip(verdicts, cases, strict=True) if case.form == "letter"]
        assert set(letters) == {None}
        assert {True, False} <= set(verdicts)
    assert script.table_of_others(cases) in (ROOT / "docs/evidence/grading.md").read_text("utf-8")


@pytest.mark.slow
def test_verdicts_differ_from_the_suites_exactly_where_it_is_said(graded):
    cases, ours = graded
    wrong = [
        (case.suite, case.gold[-80:], case.text[-80:], found)
        for case, found in zip(cases, ours, strict=True)
        if (found != case.right) != bool(case.why)
    ]
    assert not wrong


@pytest.mark.slow
def test_no_suite_agrees_better_with_math_verify_alone(script, graded):
    cases, ours = graded
    theirs = script.verdicts_of_math_verify(cases)
    for suite in {case.suite for case in cases}:
        chosen = [
            index for index, case in enumerate(cases) if case.suite == suite and not script.is_disputed(case)
        ]
        assert script.agreeing(cases, ours, chosen) >= script.agreeing(cases, theirs, chosen), suite
    assert script.table(cases, ours, theirs) in (ROOT / "docs/evidence/grading.md").read_text("utf-8")
