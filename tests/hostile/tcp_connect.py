"""Calls home."""

import socket

with socket.create_connection(("127.0.0.1", HOST["port"]), timeout=5) as connection:
    connection.sendall(b"secrets")


def solve(x):
    return x * x
