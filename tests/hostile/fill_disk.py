"""Fills the disk with one file."""

with open("/tmp/full", "wb") as file:
    for _ in range(4096):
        file.write(b"x" * 2**20)
        file.flush()


def solve(x):
    return x * x
