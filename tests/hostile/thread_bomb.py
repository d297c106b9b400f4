"""Starts threads until nothing is left."""

import threading
import time

threads = []
while True:
    thread = threading.Thread(target=time.sleep, args=(60,), daemon=True)
    thread.start()
    threads.append(thread)
    if len(threads) > 1000:

        def solve(x):
            return x * x

        break
