"""A process that compares mathematical answers with math-verify, and that whoever started it can kill.

Reads one JSON object per line ({"gold", "answer", "relative", "absolute"}), writes one ({"same", "how"}).
sympy can spend hours in one C call (a power tower), where no signal reaches it; its memory is limited too.
"""

import json
import logging
import re
import sys
from typing import Any

_MAX_BYTES = 4 << 30  # of address space

_SECONDS = 5  # math-verify's own limit of each comparison, which leaves this process alive


def compare(gold: str, answer: str, relative: float, absolute: float) -> dict[str, Any]:
    """Compare an answer with the reference, as numbers within a tolerance or by math-verify."""
    from math_verify import parse, verify

    if relative or absolute:
        first = _number(gold)
        second = _number(answer)
        if first is not None and second is not None:
            return {"same": abs(first - second) <= max(absolute, relative * abs(first)), "how": "numbers"}
    left = parse(_boxed(gold), parsing_timeout=_SECONDS)
    right = parse(_boxed(answer), parsing_timeout=_SECONDS)
    return {"same": verify(left, right, timeout_seconds=_SECONDS), "how": "math-verify"}


def _boxed(text: str) -> str:
    return r"\boxed{" + text.replace("$", "") + "}"


def _number(text: str) -> complex | None:
    """The value of a numeric expression; None for anything with a symbol."""
    from math_verify import parse

    plain = text.replace("$", "").replace(",", "").strip()
    try:
        return complex(float(plain))
    except ValueError:
        pass
    text = re.sub(r"np\.(\w+)", r"\\\1", text)  # Minerva writes np.arcsin(10/13)
    text = re.sub(r"([0-9])\.(?![0-9])", r"\1", text)  # and -3./2
    text = re.sub(r"([0-9.]+)[eE]([+-]?[0-9]+)", r"\1 \\times 10^{\2}", text)
    for expression in parse(_boxed(text), parsing_timeout=_SECONDS):
        if getattr(expression, "is_number", False):
            return complex(expression.evalf(15))
    return None


def main() -> None:
    logging.disable(logging.CRITICAL)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, _MAX_BYTES))
    except (ImportError, ValueError):  # no such limit on this system: the time limit still holds
        pass
    for line in sys.stdin:
        try:
            reply = compare(**json.loads(line))
        except Exception as error:  # whatever sympy raises on what a model wrote is "not the same"
            reply = {"same": False, "how": f"{type(error).__name__}: {error}"[:200]}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
