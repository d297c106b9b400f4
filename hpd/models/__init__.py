"""Student and teacher models: loading them, comparing them, running a function inside their forward."""

from hpd.models.load import load_config, load_model, load_tokenizer

__all__ = [
    "load_config",
    "load_model",
    "load_tokenizer",
]
