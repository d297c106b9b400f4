"""Runs over the C stack."""

import sys

sys.setrecursionlimit(2**30)


class Deep:
    def __getattr__(self, name):
        return getattr(self, name + "x")


print(Deep().anything)


def solve(x):
    return x * x
