"""Takes all memory at once."""

block = bytearray(64 * 2**30)


def solve(x):
    return x * x
