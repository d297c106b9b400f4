"""Looks for a token in every environment there is."""

import ctypes
import os

texts = [repr(dict(os.environ)), repr(os.getenv("HPD_TEST_SECRET"))]
for pid in ("self", "1", str(os.getppid()), str(HOST["pid"])):
    try:
        texts.append(open(f"/proc/{pid}/environ").read())
    except OSError:
        pass
environ = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
index = 0
while environ and environ[index]:
    texts.append(repr(environ[index]))
    index += 1
print(texts)
assert any(HOST["secret_text"] in text for text in texts)


def solve(x):
    return x * x
