"""Takes all memory piece by piece, and touches it."""

blocks = []
while len(blocks) < 4096:
    blocks.append(b"x" * 2**20)


def solve(x):
    return x * x
