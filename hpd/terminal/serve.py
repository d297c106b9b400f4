"""`hpd serve-teacher` in a terminal."""

from __future__ import annotations

import os
from typing import Any

from hpd.http import read_key
from hpd.teachers.remote.serve import ServeSettings, serve_model

__all__ = ["run_serve"]

_TOKEN_ENV = "HPD_SERVE_TOKEN"
"""Read unasked; another variable is named because it holds the token."""


def run_serve(
    model: str,
    dtype: str,
    quantization: str | None,
    token_env: str,
    max_batch_tokens: int,
    **settings: Any,
) -> None:
    """Serve a teacher until the process is told to end; the token is read from the environment."""
    unasked = token_env == _TOKEN_ENV and token_env not in os.environ
    token = None if unasked else read_key(token_env, "--token-env")
    serve_model(model, dtype, quantization, ServeSettings(token=token, **settings), max_batch_tokens)
