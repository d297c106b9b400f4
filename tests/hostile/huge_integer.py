"""One instruction that takes hours and cannot be interrupted from Python."""


def solve(x):
    return 9 ** (9**9) and x * x
