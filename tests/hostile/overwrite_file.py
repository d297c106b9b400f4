"""Writes into a file of the user."""

with open(HOST["canary"], "w") as file:
    file.write("overwritten")


def solve(x):
    return x * x
