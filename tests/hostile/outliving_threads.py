"""Leaves threads behind that keep the process alive."""

import threading
import time


def forever():
    while True:
        time.sleep(0.01)


for _ in range(4):
    threading.Thread(target=forever, daemon=False).start()


def solve(x):
    return 0
