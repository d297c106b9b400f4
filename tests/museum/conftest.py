"""Tiny models of the museum, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import tiny_pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A student and a teacher, of the llama family."""
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))
