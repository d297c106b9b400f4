"""Fills pipes, logs and disks."""

while True:
    print("x" * 1000)
