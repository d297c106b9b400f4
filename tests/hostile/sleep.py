"""Waits for good, without using the processor."""

import time


def solve(x):
    time.sleep(10**6)
    return x * x
