"""A few tokens through a loaded model, before training: its head, rows that are packed, what cannot be saved.

Axes: T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import Tensor, nn
from transformers import GenerationConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hpd.losses.heads import Scores
from hpd.losses.products import logits
from hpd.models.forward import add_head_function, has_own_logits, label_inputs, use_own_logits
from hpd.models.pairing import CheckResult

__all__ = [
    "check_savable",
    "distance_of_logits",
    "mend_generation",
    "probe_head",
    "probe_packing",
    "rounding_of",
    "rounding_of_logits",
]

# Tokens of the two probing rows, the ids of which are spread over the vocabulary.
_ROW_LENGTHS = (5, 8)
# Of packed rows that are read apart: how far logits may be from those of the row alone, as a share of what
# reading them as one text moves them. Rounding to bfloat16 comes to some hundredths, leaks to 1.
_LEAK = 0.2
# Families of transformers that tests/models/test_probe.py finds to keep packed rows apart.
_KEEP_APART = (
    "llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, gemma2, gemma3, phi3, olmo2, smollm3, granite"
)
# What a generation configuration must not say where nothing is sampled, or where there is one beam.
_OF_SAMPLING = (
    "temperature",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "top_k",
    "epsilon_cutoff",
    "eta_cutoff",
)
_OF_BEAMS = ("early_stopping", "length_penalty")
_TINY = torch.finfo(torch.float32).tiny
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def probe_head(model: nn.Module, role: str) -> CheckResult:
    """Compare hidden states times head with the model's own logits; where they differ, use the latter.

    Args:
        model: a causal language model with its weights (not its PEFT wrapper); `add_head_function` and, where
            needed, `use_own_logits` are done to it.
        role: student or teacher, for the text.

    Raises:
        ValueError: as `head_of`.
    """
    verdict = _probe_head(add_head_function(model), role)
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    # A process without the weights has not looked; all must run the same.
    if together and any(gather_object([has_own_logits(model)])):
        use_own_logits(model)
    return verdict


def _probe_head(model: nn.Module, role: str) -> CheckResult:
    if not _is_whole(model):
        return CheckResult("ok", "head", f"the {role}'s weights are in pieces, and its head was not probed")
    inputs = {"input_ids": _rows(model)[1]}
    with _reading(model):
        try:
            expected = model(**inputs, use_cache=False).logits[0]
        except Exception as error:  # a forward is anybody's code, and training may give it what it lacks here
            text = f"the {role} reads no text alone ({_reason(error)}): its head was not probed"
            return CheckResult("warning", "head", text)
        distance = _distance_of_head(model, inputs, expected)
    if distance is not None and distance <= rounding_of_logits(expected):
        return CheckResult("ok", "head", f"the {role}'s hidden states and head give its own logits")
    use_own_logits(model)
    found = "cannot be taken apart" if distance is None else f"gives logits {distance:.1%} off"
    return CheckResult(
        "warning",
        "head",
        f"the {role}'s head ({type(model).__name__}) is more than a product, a scale and a cap ({found}): "
        "its own forward computes the logits, of all positions at once, which is right, slower, and takes "
        "more memory.",
    )


def _distance_of_head(model: Any, inputs: dict[str, Tensor], expected: Float[Tensor, "T V"]) -> float | None:
    """Distance of the head's logits from the model's; None where there is no such head."""
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "base_model"):
        return None
    index = torch.arange(len(expected), device=expected.device)
    try:
        scores: Scores = model(**label_inputs(inputs, index), head_function=lambda scores: scores)
        given = logits(scores).to(expected.device)
    except ValueError:  # an adapter that the head cannot have, said by `head_of`
        raise
    except Exception:  # as above: then the model's own forward is what is left
        return None
    return distance_of_logits(given, expected) if given.shape == expected.shape else None


def probe_packing(model: nn.Module, role: str) -> CheckResult:
    """Compare rows that are packed with the same rows alone.

    Args:
        model: a causal language model with its weights, or its PEFT wrapper.
        role: student or teacher, for the text.
    """
    if not _is_whole(model):
        return CheckResult("ok", "packing", f"the {role}'s weights are in pieces: packing was not probed")
    rows = _rows(model)
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    packed = collate([{"input_ids": row[0].tolist()} for row in rows])
    packed.pop("labels")
    width = rows[1].shape[1]
    with _reading(model):
        try:
            alone = model(input_ids=rows[1], use_cache=False).logits[0, -width:]
            joined = model(input_ids=torch.cat(rows, 1), use_cache=False).logits[0, -width:]
        except Exception as error:  # as in `_probe_head`
            text = f"the {role} reads no text alone ({_reason(error)}): packing was not probed"
            return CheckResult("warning", "packing", text)
        try:
            placed = {k: v.to(alone.device) if isinstance(v, Tensor) else v for k, v in packed.items()}
            found = model(**placed, use_cache=False).logits[0, -width:]
        except Exception as error:  # as above
            return _refused(model, role, f"does not take packed rows ({_reason(error)})")
    leak, most = distance_of_logits(found, alone), distance_of_logits(joined, alone)
    if leak > max(_LEAK * most, rounding_of_logits(alone)):
        return _refused(
            model, role, f"reads a row behind another unlike the row alone (logits {leak:.1%} off)"
        )
    return CheckResult("ok", "packing", f"the {role} reads packed rows as it reads each alone")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _refused(model: nn.Module, role: str, problem: str) -> CheckResult:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    name = type(base).__name__ if base is model else f"{type(base).__name__} with its adapter"
    return CheckResult(
        "error",
        "packing",
        f"the {role} ({name}) {problem}, and packed rows would change what is learned: set train.packing, "
        "train.eval_packing and train.padding_free to false, or take a family that keeps rows apart "
        f"({_KEEP_APART}, ...) without prompt tuning.",
    )


def check_savable(config: Any, generation: GenerationConfig | None, tokenizer: Any) -> list[CheckResult]:
    """Write configurations and tokenizer to a scratch folder, as the first checkpoint will.

    Args:
        config: of the student.
        generation: how it generates; one that says two things is looked at as `mend_generation` leaves it.
        tokenizer: or processor; None is left out.

    Raises:
        OSError: the scratch folder takes no more, which says nothing about the student.
    """
    verdicts: list[CheckResult] = []
    if generation is not None:
        generation = copy.deepcopy(generation)
        verdicts += mend_generation(generation)
    parts = {"config.json": config, "generation_config.json": generation, "tokenizer": tokenizer}
    with tempfile.TemporaryDirectory() as folder, _unsaid():
        for name, part in parts.items():
            try:
                if part is not None:
                    part.save_pretrained(folder)
            except Exception as error:  # what others wrote may fail in any way
                if reason := _refused_by_disk(error):
                    raise OSError(
                        f"{tempfile.gettempdir()} cannot be written ({reason}), so nothing tells whether the "
                        "student can be saved: make space, or name another folder in TMPDIR."
                    ) from error
                text = (
                    f"the student's {name} cannot be saved, and neither could what is trained "
                    f"({type(error).__name__}: {' '.join(str(error).split())[:300]}): correct it in the "
                    "student's folder."
                )
                verdicts.append(CheckResult("error", "saving", text))
    return verdicts


def _refused_by_disk(error: Exception) -> str | None:
    """Why the disk took no more, where that is the error; tokenizers says so in its text alone."""
    said = re.search(r"\(os error (\d+)\)", str(error))
    number = int(said[1]) if said else getattr(error, "errno", None)
    return os.strerror(number) if number in _OF_THE_DISK else None


def mend_generation(generation: GenerationConfig) -> list[CheckResult]:
    """Take from a generation configuration, in place, settings of a way to generate that it does not ask for.

    transformers reads such a file and refuses to save it again; it generates the same without them.
    """
    try:
        generation.validate(strict=True)
    except ValueError:
        idle = () if generation.do_sample is True else _OF_SAMPLING
        idle += _OF_BEAMS if (generation.num_beams or 1) == 1 else ()
        said = {name: value for name in idle if (value := getattr(generation, name, None)) is not None}
        if not said:
            return []  # trying to save it says the rest
        for name in said:
            setattr(generation, name, None)
        listed = ", ".join(f"{name}: {value}" for name, value in said.items())
        text = (
            f"the student's generation_config.json has {listed} beside do_sample: {generation.do_sample} and "
            f"num_beams: {generation.num_beams}, under which they have no effect, and transformers refuses "
            "to write that: the trained student is saved without them, and generates as before."
        )
        return [CheckResult("warning", "generation", text)]
    return []


@contextlib.contextmanager
def _unsaid() -> Iterator[None]:
    """Keep transformers from saying that it wrote to a scratch folder."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


@contextlib.contextmanager
def _reading(model: nn.Module) -> Iterator[None]:
    """No gradient, no dropout; afterwards the mode of each module is as before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _rows(model: Any) -> list[Tensor]:
    """Two rows of a few tokens, `[1, T]` each, on the device of the embeddings."""
    embeddings = model.get_input_embeddings().weight
    vocab = min(model.config.get_text_config().vocab_size, len(embeddings))
    count = sum(_ROW_LENGTHS)
    ids = torch.arange(1, count + 1, device=embeddings.device) * 7919 % max(vocab - 1, 1)
    return [row[None] for row in ids.split(_ROW_LENGTHS)]


def _is_whole(model: nn.Module) -> bool:
    """True if this process has all weights at hand."""
    return not any(
        parameter.is_meta or hasattr(parameter, "ds_id") or hasattr(parameter, "full_tensor")
        for parameter in model.parameters()
    )


def distance_of_logits(given: Float[Tensor, "T V"], expected: Float[Tensor, "T V"]) -> float:
    """Root mean square of the difference over that of the logits, both without what a softmax ignores."""
    given, expected = _seen(given), _seen(expected)
    return (_size(given - expected) / _size(expected).clamp_min(_TINY)).item()


def rounding_of_logits(logits: Float[Tensor, "T V"]) -> float:
    """The distance (`distance_of_logits`) that the precision of logits accounts for.

    A logit is rounded by its own size, which of a trained model is several times what a softmax sees of it:
    the logits of Gemma 3 270M lie around -40, and differ by 4.
    """
    return rounding_of(logits) * (_size(logits.float()) / _size(_seen(logits)).clamp_min(_TINY)).item()


def _seen(logits: Tensor) -> Tensor:
    return logits.float() - logits.float().mean(-1, keepdim=True)


def _size(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def rounding_of(values: Tensor) -> float:
    """The relative error that the precision of values accounts for: that of their dtype, or of a coarser one
    that they were computed in and widened from, as mixed precision does with what a model returns."""
    # TensorFloat-32, where it is allowed, keeps three digits.
    least = 1e-4 if torch.get_float32_matmul_precision() == "highest" else 1e-3
    coarse = (torch.bfloat16, torch.float16)
    dtype = next((d for d in coarse if torch.equal(values.to(d).to(values.dtype), values)), values.dtype)
    return least + 0.75 * torch.finfo(dtype).eps
