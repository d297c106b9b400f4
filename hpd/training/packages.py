"""Settings that name an optional package, or a token of the tokenizer: looked up before models load."""

from __future__ import annotations

from typing import Any

from transformers import Trainer
from transformers.utils import is_liger_kernel_available

__all__ = ["check_packages", "check_special_tokens"]


def check_packages(args: Any) -> None:
    """Import what the optimiser and the kernels of a run come from.

    Args:
        args: TrainingArguments.

    Raises:
        ValueError: a package that is not there, named with its setting.
    """
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        # Other complaints are about the model, which some optimisers want to see and is not loaded yet.
        if isinstance(error, ImportError) or "install" in reason or "import" in reason:
            raise ValueError(
                f"train.optim: {getattr(args.optim, 'value', args.optim)} needs a package that is not here: "
                f"{reason.rstrip('.')}. Or take train.optim: adamw_torch, which comes with torch."
            ) from None
    except (TypeError, NotImplementedError, AttributeError):
        pass  # as above: said when there is a model
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError(
            "train.use_liger_kernel needs liger-kernel >= 0.3.0, which is not here: pip install it, or "
            "remove the setting (the loss is fused without it)."
        )


def check_special_tokens(args: Any, tokenizer: Any) -> None:
    """Look `train.eos_token` and `train.pad_token` up in the tokenizer.

    Args:
        args: `SFTConfig`.
        tokenizer: or a processor that has one.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    vocabulary = getattr(tokenizer, "tokenizer", tokenizer)
    for name in ("eos_token", "pad_token"):
        token = getattr(args, name, None)
        if token is None or token in vocabulary.get_vocab():
            continue
        ends = ", ".join(repr(t) for t in list(dict.fromkeys(vocabulary.all_special_tokens))[:8])
        raise ValueError(
            f"train.{name} is {token!r}, which the student's tokenizer does not have: name one of its tokens "
            f"(its special ones are {ends}), or remove it for the tokenizer's own."
        )
