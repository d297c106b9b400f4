"""The tests of EvalPlus: a program's outputs on given inputs against those of the reference. Runs inside the
sandbox.

Its source is sent there (`hpd.evaluate.benchmarks.code`), so it imports the standard library only. Rules as
in EvalPlus 0.3: exact equality, or for floats numpy's ``allclose`` with the problem's `atol`, and the few
problems with more than one right output.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, Protocol

RELATIVE_TOLERANCE = 1e-7

DEFAULT_FLOAT_TOLERANCE = 1e-6
"""Absolute, where the reference's output is of floats and the problem states none."""

SET_EQUALITY = {
    "similar_elements",
    "find_char_long",
    "common_in_nested_lists",
    "extract_singly",
    "larg_nnum",
    "intersection_array",
    "find_dissimilar",
    "Diff",
}
"""MBPP functions whose outputs are compared as sets."""

NONE_OR_NOT = {"check_str", "text_match_three", "text_starta_endb"}
"""MBPP functions that may return anything for yes: a match, True, a string; None or False for no."""


MAX_KEPT_CHARS = 2**20
"""Outputs of a reference that are kept whole, all inputs of a problem together; of the others the digests."""


class Messages(Protocol):
    """What the sandbox's `wire` does with long answers."""

    def digest(self, value: Any) -> str | None: ...
    def size(self, value: Any) -> int: ...
    def value_of(self, answer: Any) -> Any: ...


def kept_outputs(
    function: Callable[..., Any], entry_point: str, inputs: list[Any], wire: Messages
) -> list[tuple[str, Any]]:
    """For each input ("value", the reference's output) or, once these are long, ("digest", of the output).

    Holds one output beside what is kept.
    """
    kept: list[tuple[str, Any]] = []
    left = MAX_KEPT_CHARS
    for arguments in inputs:
        output = function(*arguments)
        left -= wire.size(output)
        mark = wire.digest(output) if left < 0 else None
        if mark is not None:
            kept.append(("digest", mark))
        else:
            kept.append(("value", _expected(wire.value_of(output), entry_point)))
    return kept


def loaded(solution: str, entry_point: str) -> Callable[..., Any]:
    """The reference's function, in this process: never for a program that a model wrote."""
    namespace: dict[str, Any] = {"__name__": "reference"}
    exec(compile(solution, "<reference>", "exec"), namespace)
    return namespace[entry_point]


def compare_outputs(
    function: Callable[..., Any],
    entry_point: str,
    inputs: list[Any],
    expected: list[tuple[str, Any]],
    atol: float,
    solution: str,
    wire: Messages,
) -> None:
    """Raise AssertionError, with the input's number, at the first wrong output.

    Where a long output has another digest than the reference's, it may still be right (1.0 for 1): the
    reference then runs here on that input.

    Args:
        expected: of `kept_outputs`.
        solution: the reference, a whole program.
    """
    for number, (arguments, (kind, reference)) in enumerate(zip(inputs, expected, strict=True), start=1):
        output = function(*arguments)
        if kind == "digest":
            if wire.digest(output) == reference:
                continue
            output = wire.value_of(output)
            reference = _expected(loaded(solution, entry_point)(*copy.deepcopy(arguments)), entry_point)
        output = wire.value_of(output)
        if not matches(output, reference, entry_point, arguments, atol):
            raise AssertionError(
                f"input {number} of {len(inputs)}: {_short(output)} instead of {_short(reference)}"
            )


def _expected(output: Any, entry_point: str) -> Any:
    """An output of the reference in the form that `matches` takes."""
    return output is not None if entry_point in NONE_OR_NOT else output


def matches(output: Any, reference: Any, entry_point: str, arguments: list[Any], atol: float) -> bool:
    """True if an output is right."""
    if entry_point in _OWN_RULES:
        own = _OWN_RULES[entry_point](output, reference, arguments, atol)
        if own is not None:
            return own
    if output == reference:
        return True
    tolerance = atol or (DEFAULT_FLOAT_TOLERANCE if _is_floats(reference) else 0)
    return bool(tolerance) and _all_close(output, reference, tolerance)


def _is_floats(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(item, float) for item in value)
    return isinstance(value, float)


def _all_close(output: Any, reference: Any, atol: float) -> bool:
    if type(output) is not type(reference):
        return False
    if isinstance(reference, (list, tuple)):
        pairs = zip(output, reference, strict=False)
        return len(output) == len(reference) and all(_close_items(left, right, atol) for left, right in pairs)
    return _close_items(output, reference, atol)


def _close_items(output: Any, reference: Any, atol: float) -> bool:
    if isinstance(reference, (list, tuple)):
        return isinstance(output, (list, tuple)) and _all_close(list(output), list(reference), atol)
    if not all(isinstance(value, (int, float, complex)) for value in (output, reference)):
        return False
    if output == reference:
        return True
    difference = abs(output - reference)
    scale = abs(reference)
    return math.isfinite(scale) and difference <= atol + RELATIVE_TOLERANCE * scale


def _as_sets(output: Any, reference: Any, arguments: list[Any], atol: float) -> bool:
    return set(output) == set(reference)


def _none_or_not(output: Any, reference: Any, arguments: list[Any], atol: float) -> bool:
    return (output if isinstance(output, bool) else output is not None) == reference


def _is_root(output: Any, reference: Any, arguments: list[Any], atol: float) -> bool:
    # Any root of the polynomial is right; by its value there, since roots are ill-conditioned.
    return (
        abs(sum(coefficient * math.pow(output, power) for power, coefficient in enumerate(arguments[0])))
        <= atol
    )


def _pyramid_area(output: Any, reference: Any, arguments: list[Any], atol: float) -> bool | None:
    base, height = arguments
    area = base**2 + 2 * base * math.hypot(base / 2, height)
    return True if abs(output - round(area)) <= atol else None


def _digit_distance(output: Any, reference: Any, arguments: list[Any], atol: float) -> bool | None:
    digits = [str(number) for number in arguments]
    width = max(map(len, digits))
    pairs = zip(*(text.zfill(width) for text in digits), strict=True)
    return True if output == sum(abs(int(left) - int(right)) for left, right in pairs) else None


def _anything(output: Any, reference: Any, arguments: list[Any], atol: float) -> bool:
    return True


def _or_zero(output: Any, reference: Any, arguments: list[Any], atol: float) -> bool | None:
    return True if output == 0 else None


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer beyond Python's limit for decimal digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


_OWN_RULES: dict[str, Callable[[Any, Any, list[Any], float], bool | None]] = {
    **dict.fromkeys(SET_EQUALITY, _as_sets),
    **dict.fromkeys(NONE_OR_NOT, _none_or_not),
    "find_zero": _is_root,
    "surface_Area": _pyramid_area,
    "digit_distance_nums": _digit_distance,
    "are_equivalent": _anything,  # EvalPlus found the reference wrong
    "sum_div": _or_zero,  # the reference and the text disagree on one input
}
"""Function name -> its own rule; None leaves the decision to equality and tolerance."""
