"""Ignores every signal that can be, and goes on."""

import signal
import threading

for number in range(1, signal.NSIG):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))


def solve(x):
    threading.Event().wait()
