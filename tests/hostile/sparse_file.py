"""Makes a file that is larger than the disk."""

import os

descriptor = os.open("/tmp/sparse", os.O_CREAT | os.O_RDWR)
os.truncate(descriptor, 2**40)


def solve(x):
    return x * x
