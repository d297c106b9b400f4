"""Runs a shell command on the host."""

import os

assert os.system(f"echo pwned > {HOST['canary']}") == 0


def solve(x):
    return x * x
