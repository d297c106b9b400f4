"""A test that is skipped on CI proves nothing there, so each such skip is listed here with its reason, or the
run fails."""

from __future__ import annotations

import os

import pytest

__all__ = ["ALLOWED_SKIPS", "UnlistedSkips", "fail_on_unlisted_skips"]

_DATA = "no shared/ folder"
_EVALUATE = "tests/evaluate"
_MATH = f"{_EVALUATE}/test_eval_math.py"
ALLOWED_SKIPS = {
    # Public benchmarks, which are not in the repository.
    f"{_EVALUATE}/test_eval_code.py::test_reference_solutions_pass": _DATA,
    f"{_EVALUATE}/test_eval_code.py::test_all_reference_solutions_pass": _DATA,
    f"{_EVALUATE}/test_eval_code.py::test_stubs_fail": _DATA,
    f"{_EVALUATE}/test_eval_dialogue.py::test_public_files": _DATA,
    f"{_MATH}::test_files_of_the_reference_evaluation_repeat_problems_as_samples": _DATA,
    f"{_MATH}::test_gsm8k_verdicts_of_stored_model_samples": _DATA,
    f"{_MATH}::test_boxed_references_are_right_and_those_of_the_next_problem_are_not": _DATA,
    f"{_EVALUATE}/test_evaluate.py::test_gsm8k_grades_its_own_solutions": _DATA,
    f"{_EVALUATE}/test_evaluate.py::test_math500_references_are_taken_as_a_whole": _DATA,
    f"{_EVALUATE}/test_judge.py::test_the_public_files_load": _DATA,
    # Packages made for accelerators.
    "tests/training/test_combinations.py::test_optimizers_of_the_trainer_train": "which is not installed",
    # What an unprivileged container or user may not do.
    f"{_EVALUATE}/test_sandbox.py::test_scratch_folder": "files need namespaces",
    f"{_EVALUATE}/test_sandbox.py::test_hostile_programs_of_an_ordinary_user": "",
}
"""Start of a test's id: a part of the reason that the test gives."""


def fail_on_unlisted_skips(config: pytest.Config, allowed: dict[str, str] = ALLOWED_SKIPS) -> None:
    """To be called from `pytest_configure`; nothing outside CI, nor in xdist's workers, whose reports reach
    the controller."""
    if os.environ.get("CI", "").lower() not in ("", "0", "false") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(UnlistedSkips(allowed), "unlisted-skips")


class UnlistedSkips:
    """Makes a session fail that skipped a test without permission, and says which and why."""

    def __init__(self, allowed: dict[str, str]):
        self._allowed = allowed
        self._found: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not hasattr(report, "wasxfail"):
            self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            if not any(
                report.nodeid.startswith(name) and part in reason for name, part in self._allowed.items()
            ):
                self._found[report.nodeid] = reason

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._found and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._found:
            terminalreporter.section("skipped on CI without being listed in tests/helpers/skips.py", red=True)
            for name, reason in sorted(self._found.items()):
                terminalreporter.line(f"{name}: {reason}")
