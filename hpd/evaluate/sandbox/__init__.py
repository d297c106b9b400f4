"""A sandbox for Python that a model wrote: `run_program`, `run_many`, `sandbox_report`."""

from hpd.evaluate.sandbox.host import load_factor, run_many, run_program, sandbox_report
from hpd.evaluate.sandbox.outcomes import (
    ISOLATIONS,
    Isolation,
    Limits,
    Outcome,
    Program,
    SandboxReport,
    Tests,
)

__all__ = [
    "ISOLATIONS",
    "Isolation",
    "Limits",
    "Outcome",
    "Program",
    "SandboxReport",
    "Tests",
    "load_factor",
    "run_many",
    "run_program",
    "sandbox_report",
]
