"""Moves a file of the user away and opens it for all."""

import os

done = 0
for action in (
    lambda: os.rename(HOST["canary"], "/tmp/taken"),
    lambda: os.chmod(HOST["canary"], 0o777),
    lambda: os.chown(HOST["canary"], 0, 0),
    lambda: os.utime(HOST["canary"]),
    lambda: os.link(HOST["canary"], "/tmp/linked"),
):
    try:
        action()
        done += 1
    except OSError:
        pass
assert done


def solve(x):
    return x * x
