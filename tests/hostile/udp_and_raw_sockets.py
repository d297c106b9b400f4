"""Calls home by every family of sockets that there is."""

import socket

opened = 0
for family in range(46):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
        try:
            made = socket.socket(family, kind)
        except OSError:
            continue
        try:
            made.sendto(b"secrets", ("127.0.0.1", HOST["port"]))
            opened += 1
        except (OSError, TypeError):
            pass
first, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
try:
    first.sendto(b"secrets", "\0" + HOST["abstract"])
    opened += 1
except OSError:
    pass
assert opened


def solve(x):
    return x * x
