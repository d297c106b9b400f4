"""Prints a private file."""

content = open(HOST["secret"]).read()
print(content)


def solve(x):
    return x * x
