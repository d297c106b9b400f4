"""`hpd serve-teacher` in a terminal."""

from __future__ import annotations

import os
from typing import Any

from hpd.http import read_key
from hpd.teachers.remote.serve import ServeSettings, serve_model

__all__ = ["run_serve"]


def run_serve(
    model: str,
    dtype: str,
    quantization: str | None,
    token_env: str,
    max_batch_tokens: int,
    **settings: Any,
) -> None:
    """Serve a teacher until the process is told to end; the token is read from the environment."""
    token = read_key(token_env, "--token-env") if os.environ.get(token_env) else None
    serve_model(model, dtype, quantization, ServeSettings(token=token, **settings), max_batch_tokens)
