"""Malformed tokenizers and checkpoints."""

# ruff: noqa: E501 (a case is a line)

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .case import Case

__all__ = ["CHECKPOINTS", "TOKENIZERS"]

Change = Callable[[Path], Any]


def student(change: Change, *overrides: str) -> Callable[[Path], list[str]]:
    """`hpd train` of a student that is a changed copy of the good one."""

    def build(folder: Path) -> list[str]:
        shutil.copytree(folder.parent / "student", folder / "model")
        change(folder / "model")
        return ["train", "{recipe}", f"student={folder / 'model'}", *overrides]

    return build


def used(command: str, change: Change) -> Callable[[Path], list[str]]:
    """`hpd eval` or `hpd generate` with such a model."""

    def build(folder: Path) -> list[str]:
        model = student(change)(folder)[-1].partition("=")[2]
        if command == "eval":
            return ["eval", model, "--data", "{problems}", "--output", str(folder / "out")]
        return ["generate", "{recipe}", f"generate.model={model}", f"generate.output={folder / 'out.jsonl'}"]

    return build


def edit(name: str, **changes: Any) -> Change:
    """Other values in a JSON file; None removes the key."""

    def change(folder: Path) -> None:
        tree = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).write_text(
            json.dumps({key: value for key, value in tree.items() if value is not None})
        )

    return change


def write(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def remove(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """Other tensors."""

    def build(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return build


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def sharded(lose: int | None = None, index: bytes | None = None) -> Change:
    """The weights in two shards, of which one may be lost, or the index be something else."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        files = {name: f"model-{1 + (i % 2):05d}-of-00002.safetensors" for i, name in enumerate(names)}
        for file in set(files.values()):
            save_file(
                {n: tensors[n] for n in names if files[n] == file}, folder / file, metadata={"format": "pt"}
            )
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": files}).encode()
        (folder / "model.safetensors.index.json").write_bytes(text if index is None else index)
        if lose is not None:
            (folder / f"model-{lose:05d}-of-00002.safetensors").unlink()

    return change


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"weights")


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][0] = float("nan")


def _no_template(folder: Path) -> None:
    edit("tokenizer_config.json", chat_template=None)(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)


_REFUSES = (
    b"{% for m in messages %}{% if loop.first and m.role != 'user' %}{{ raise_exception('user first') }}{% "
    b"endif %}"
    b"{{ m.content }}{% endfor %}"
)


def _late(bad: list[str]) -> Callable[[Path], list[str]]:
    """300 conversations, the last of which has these roles, for a template that wants the user first."""

    def build(folder: Path) -> list[str]:
        given = [["user", "assistant"]] * 299 + [bad]
        chats = [{"messages": [{"role": role, "content": "x"} for role in roles]} for roles in given]
        (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
        return [
            *student(write("chat_template.jinja", _REFUSES))(folder),
            f"data.path={folder / 'chats.jsonl'}",
        ]

    return build


def _late_prompt(folder: Path) -> list[str]:
    given = _late(["assistant", "user"])(folder)
    model = given[2].partition("=")[2]
    return [
        "generate",
        "{recipe}",
        f"generate.model={model}",
        given[3],
        f"generate.output={folder / 'out.jsonl'}",
    ]


def _bigger_vocabulary(folder: Path) -> None:
    tree = json.loads((folder / "tokenizer.json").read_text())
    for i in range(40):
        tree["model"]["vocab"][f"extra{i}"] = 300 + i
    (folder / "tokenizer.json").write_text(json.dumps(tree))


_FOREVER = b"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
_LOOPS = _FOREVER + b"{% for m in messages %}{{ m.content }}{% endfor %}"
_DOUBLES = b"{% set n = namespace(x='0123456789' * 1000) %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"


def _late_loop(folder: Path) -> list[str]:
    given = _late(["system", "assistant"])(folder)
    body = b"{% if messages[0].role == 'system' %}" + _FOREVER + b"{% endif %}"
    model = Path(given[2].partition("=")[2])
    (model / "chat_template.jinja").write_bytes(body + b"{% for m in messages %}{{ m.content }}{% endfor %}")
    return [*given, "--dry-run"]


_LAYER = "model.layers.1.mlp.up_proj.weight"
_WRONG = {"model_type": "t5"}
# fmt: off
TOKENIZERS: dict[str, Case] = {
    "none": Case(student(remove("tokenizer.json", "tokenizer_config.json")), "student tokenizer.*cannot be loaded"),
    "broken json": Case(student(write("tokenizer.json", b'{"version": ')), "student tokenizer.*cannot be loaded"),
    "json of something else": Case(student(write("tokenizer.json", b"[1, 2]")), "student tokenizer.*cannot be loaded"),
    "broken settings": Case(student(write("tokenizer_config.json", b"{")), "student tokenizer.*cannot be loaded"),
    "no eos": Case(student(edit("tokenizer_config.json", eos_token=None)), "has no eos_token"),
    "eos that is no token": Case(student(edit("tokenizer_config.json", eos_token="<stop>")), "eos_token.*'<stop>'"),
    "more tokens than the head": Case(student(_bigger_vocabulary, "teacher=self"), "340 tokens.*head.*300"),
    "other tokens than the teacher": Case(student(lambda f: _bigger_vocabulary(f) or edit("config.json", vocab_size=340)(f)), "340"),
    "no template": Case(student(_no_template, "data.format=chat"), "no chat template.*train.chat_template_path"),
    "broken template": Case(student(write("chat_template.jinja", b"{% for m in messages %}"), "data.format=chat"), "chat template"),
    "template that refuses": Case(student(write("chat_template.jinja", b"{{ raise_exception('no') }}"), "data.format=chat"), "chat template"),
    "template that refuses a late row": Case(_late(["system", "assistant"]), "Row 299 .turns: system, assistant.*user first"),
    "template that refuses a late prompt": Case(_late_prompt, "Row 299 .turns: assistant, user.*the writer's chat template.*user first"),
    "template that refuses a problem": Case(used("eval", write("chat_template.jinja", b"{{ raise_exception('no chat') }}")), "a prompt .turns: user.*no chat"),
    "template without an end": Case(student(write("chat_template.jinja", _LOOPS), "data.format=chat", "--dry-run"), "chat template.*did not end within 1 s"),
    "template that computes a constant without an end": Case(student(write("chat_template.jinja", b"{{ (10 ** (10 ** 9)) % 7 }}" + _LOOPS), "data.format=chat", "--dry-run"), "chat template.*did not end within 1 s"),
    "template without an end on one row": Case(_late_loop, "Row 299.*did not end within 1 s"),
    "template that doubles a text": Case(student(write("chat_template.jinja", _DOUBLES), "data.format=chat", "--dry-run"), "chat template.*more than 1 GiB"),
    "pad token beside the head": Case(student(edit("tokenizer_config.json", pad_token="<pad-of-nobody>"), "--dry-run"), "pad token '<pad-of-nobody>' has number 300"),
    "no such template": Case(lambda f: ["train", "{recipe}", f"train.chat_template_path={f / 'none.jinja'}"], "train.chat_template_path.*none.jinja"),
    "path of nothing": Case(lambda f: ["train", "{recipe}", f"student.tokenizer={f / 'none'}"], "tokenizer.*does not exist"),
    "path of a file": Case(lambda f: ["train", "{recipe}", "student.tokenizer={rows}"], "tokenizer.*is a file"),
}

CHECKPOINTS: dict[str, Case] = {
    "nothing there": Case(student(gone), "does not exist"),
    "a file": Case(student(a_file), "is a file"),
    "empty folder": Case(student(empty), "has no config.json.*nothing"),
    "no config": Case(student(remove("config.json")), "has no config.json"),
    "broken config": Case(student(write("config.json", b"{")), "student .*config"),
    "config is a list": Case(student(write("config.json", b"[]")), "student .*config"),
    "config is binary": Case(student(write("config.json", b"\xff\xfe\x00")), "student .*config"),
    "config of nothing": Case(student(write("config.json", b"{}")), "student .*model_type"),
    "unknown architecture": Case(student(edit("config.json", model_type="llamma")), "llamma"),
    "not a causal model": Case(student(write("config.json", json.dumps(_WRONG).encode()), "student.tokenizer={student}"), "t5 model, which is not a causal"),
    "config says text": Case(student(edit("config.json", hidden_size="wide")), "hidden_size|wide"),
    "config says minus": Case(student(edit("config.json", num_hidden_layers=-1)), "num_hidden_layers|layers"),
    "config says nought heads": Case(student(edit("config.json", num_attention_heads=0)), "student"),
    "config says no width": Case(student(edit("config.json", hidden_size=0), "--dry-run"), "hidden_size 0: >= 1"),
    "config says negative width": Case(student(edit("config.json", hidden_size=-4), "--dry-run"), "hidden_size -4"),
    "config with unknown attention": Case(student(edit("config.json", attn_implementation="nope"), "--dry-run"), "nope"),
    "config with unknown activation": Case(student(edit("config.json", hidden_act="nope"), "--dry-run"), "nope"),
    "config with unknown quantization": Case(student(edit("config.json", quantization_config={"quant_method": "nope"}), "--dry-run"), "nope"),
    "config with missing quantization": Case(student(edit("config.json", quantization_config={"quant_method": "gptq", "bits": 4}), "--dry-run"), "optimum|gptq"),
    "unknown attention": Case(lambda f: ["train", "{recipe}", "student.attn_implementation=nope", "--dry-run"], "student .*nope.*student.attn_implementation"),
    "unknown attention of the teacher": Case(lambda f: ["train", "{recipe}", "teacher.attn_implementation=nope", "--dry-run"], "teacher .*nope.*teacher.attn_implementation"),
    "no weights": Case(student(remove("model.safetensors")), "no weights"),
    "weights cut short": Case(student(cut), "model.safetensors.*cut short or damaged"),
    "weights of zeros": Case(student(write("model.safetensors", bytes(4096))), "model.safetensors.*cut short or damaged"),
    "weights empty": Case(student(write("model.safetensors", b"")), "model.safetensors.*cut short or damaged"),
    "large-file pointer": Case(student(write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n")), "Git LFS pointer"),
    "missing shard": Case(student(sharded(lose=2)), "model-00002-of-00002.safetensors.*missing"),
    "broken index": Case(student(sharded(index=b"{")), "index.json"),
    "index of nothing": Case(student(sharded(index=b"{}")), "index.json.*weight_map"),
    "index out of the folder": Case(student(sharded(index=b'{"weight_map": {"a": "../x.safetensors"}}')), "index.json.*outside"),
    "pickle only": Case(student(pickled), "pickle.*allow_pickle"),
    "wrong shapes": Case(student(weights(lambda t: t.update({_LAYER: torch.zeros(3, 32)}))), "shape.*up_proj|up_proj.*shape"),
    "a tensor missing": Case(student(weights(lambda t: t.pop(_LAYER))), "lacks.*up_proj"),
    "config with more layers": Case(student(edit("config.json", num_hidden_layers=3)), "lacks.*layers.2"),
    "config with fewer layers": Case(student(edit("config.json", num_hidden_layers=1)), "layers.1.*config"),
    "config with a larger vocabulary": Case(student(edit("config.json", vocab_size=400), "train.vocabulary=shared_prefix"), "shape.*embed_tokens|embed_tokens.*shape"),
    "config with another width": Case(student(edit("config.json", hidden_size=64)), "shape"),
    "not a number among the weights": Case(student(weights(_nan)), "norm.weight.*nan or infinite"),
    "code of its own": Case(student(edit("config.json", model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"})), "trust_remote_code"),
    "attention from the Hub": Case(student(edit("config.json", attn_implementation="someone/kernel")), "someone/kernel.*attn_implementation"),
    "quantized by something not here": Case(student(edit("config.json", quantization_config={"quant_method": "awq", "bits": 4})), "student"),
    "eval: cut short": Case(used("eval", cut), "cut short or damaged"),
    "eval: pickle": Case(used("eval", pickled), "pickle"),
    "eval: tensor missing": Case(used("eval", weights(lambda t: t.pop(_LAYER))), "lacks.*up_proj"),
    "generate: cut short": Case(used("generate", cut), "cut short or damaged"),
    "generate: missing shard": Case(used("generate", sharded(lose=1)), "missing"),
}
# fmt: on
