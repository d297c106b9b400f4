"""A process that finds the program in an answer, and that whoever started it can kill.

Reads one JSON object per line ({"text", "entry_point", "prompt", "style"}), writes one ({"program"}).
Python's parser can take long over, and even crash on, what a model writes.
"""

import json
import sys
from typing import Any

from hpd.evaluate.benchmarks.code_extraction import complete, extract_program, without_own_tests

_MAX_BYTES = 2 << 30  # of address space


def find(text: str, entry_point: str, prompt: str, style: str) -> str | None:
    """The program of an answer, without the model's own tests of it."""
    if style == "completion" and "```" not in text:
        program = complete(prompt, text.replace("\r\n", "\n")) if text.strip() else None
    else:
        program = extract_program(text, entry_point, prompt)
    return without_own_tests(program, entry_point) if program is not None else None


def main() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, _MAX_BYTES))
    except (ImportError, ValueError):  # no such limit on this system: the time limit still holds
        pass
    for line in sys.stdin:
        reply: dict[str, Any]
        try:
            reply = {"program": find(**json.loads(line))}
        except Exception as error:  # an answer that breaks the search holds no program
            reply = {"program": None, "error": f"{type(error).__name__}: {error}"[:200]}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
