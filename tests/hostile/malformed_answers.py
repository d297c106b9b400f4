"""Answers with forms that a careless reader trips over."""

import json
import os
import struct

for form in (
    {"T": "x"},
    {"h": "../../etc"},
    {"i": "zz"},
    {"nope": 1},
    {"a": 1, "b": 2},
    {"D": "sNaN"},
    {"r": [0, 10**30, 1]},
):
    content = json.dumps({"value": form}).encode()
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, struct.pack("<I", len(content)) + content)
        except OSError:
            pass


def solve(x):
    return 0
