"""The tokens at which a model's generation stops."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from hpd.config.models import ModelConfig

__all__ = ["end_tokens"]


def end_tokens(source: ModelConfig, config: Any) -> frozenset[int]:
    """The end tokens of a model's generation configuration, or of its configuration where it has none.

    Args:
        source: where the model is.
        config: its configuration.
    """
    found: Any = None
    if source.init == "pretrained":
        try:
            saved = GenerationConfig.from_pretrained(source.model, revision=source.revision or "main")
            found = saved.eos_token_id
        except (OSError, ValueError):
            found = None  # a model without the file has its configuration's
    if found is None:
        found = config.get_text_config().eos_token_id
    return frozenset([found] if isinstance(found, int) else found or ())
