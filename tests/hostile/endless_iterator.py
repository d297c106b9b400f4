"""Answers with an iterator that never ends."""

import itertools


def solve(x):
    return itertools.repeat(9)
