"""A process that compares mathematical answers with math-verify, and that whoever started it can kill.

Reads one JSON object per line ({"gold", "answer", "relative", "absolute"}), writes one ({"same", "how"}).
sympy can spend hours in one C call (a power tower), where no signal reaches it; its memory is limited too.
"""

import json
import logging
import re
import signal
import sys
from typing import Any

_MAX_BYTES = 4 << 30  # of address space
_CPU_SECONDS = 12.0  # of one comparison: a clock would give other verdicts on a busy machine


class _TooLong(BaseException):
    """Nobody between the handler and `main` may catch it."""


def compare(gold: str, answer: str, relative: float, absolute: float) -> dict[str, Any]:
    """Compare an answer with the reference, as numbers within a tolerance or by math-verify."""
    from hpd.evaluate.benchmarks.equality import same_mathematics

    if relative or absolute:
        first = _number(gold)
        second = _number(answer)
        if first is not None and second is not None:
            return {"same": abs(first - second) <= max(absolute, relative * abs(first)), "how": "numbers"}
    same, how = same_mathematics(gold, answer)
    return {"same": same, "how": how}


def _number(text: str) -> complex | None:
    """The value of a numeric expression; None for anything with a symbol."""
    from hpd.evaluate.benchmarks.equality import number

    plain = text.replace("$", "").replace(",", "").strip()
    try:
        return complex(float(plain))
    except ValueError:
        pass
    text = re.sub(r"np\.(\w+)", r"\\\1", text.replace("$", ""))  # Minerva writes np.arcsin(10/13)
    text = re.sub(r"([0-9])\.(?![0-9])", r"\1", text)  # and -3./2
    text = re.sub(r"([0-9.]+)[eE]([+-]?[0-9]+)", r"\1 \\times 10^{\2}", text)
    value = number(text)
    return complex(value.evalf(15)) if value is not None else None


def _limit_processor_time(seconds: float) -> None:
    """Raise `_TooLong` after so much processor time of this process; 0: never."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGVTALRM, _give_up)
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)


def _give_up(*_: object) -> None:
    raise _TooLong


def main() -> None:
    logging.disable(logging.CRITICAL)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, _MAX_BYTES))
    except (ImportError, ValueError):  # no such limit on this system: the time limit still holds
        pass
    for line in sys.stdin:
        try:
            _limit_processor_time(_CPU_SECONDS)
            reply = compare(**json.loads(line))
            _limit_processor_time(0)
        except _TooLong:
            reply = {"same": False, "how": "timeout"}
        except Exception as error:  # whatever sympy raises on what a model wrote is "not the same"
            reply = {"same": False, "how": f"{type(error).__name__}: {error}"[:200]}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
