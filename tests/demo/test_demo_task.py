"""The demo's task and the files it ships."""

import gzip
import json
import random
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hpd.demo.build_teacher import build_tokenizer, encode_rows, write_completions
from hpd.demo.plot import plot_training
from hpd.demo.task import (
    SPLITS,
    STYLES,
    SolvedProblem,
    Split,
    final_answer,
    generate_rows,
    is_correct,
    operation,
    split_of,
    write_solution,
)

DEMO = Path(str(files("hpd.demo")))
COLUMNS = {"prompt", "completion", "answer"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(DEMO / "teacher")


def shipped_rows(name: str) -> list[SolvedProblem]:
    raw = (DEMO / "data" / name).read_bytes()
    text = gzip.decompress(raw) if name.endswith(".gz") else raw
    return [json.loads(line) for line in text.decode().splitlines()]


def claims(completion: str, prompt: str) -> list[str]:
    """The expressions that a solution says are worth the same, in one list per chain of equalities."""
    steps = completion.split("####")[0]
    return steps.split(",") if "," in steps else [prompt + steps]


@pytest.mark.parametrize("split", SPLITS)
def test_every_solution_is_correct_in_every_step(split: Split) -> None:
    for row in generate_rows(split, 500, seed=3):
        assert row["answer"] == str(eval(row["prompt"].rstrip("=")))
        assert is_correct(row["completion"], row["answer"])
        for chain in claims(row["completion"], row["prompt"]):
            assert len({eval(side) for side in chain.split("=")}) == 1, row


def test_splits_are_disjoint_and_reproducible() -> None:
    prompts = {split: {row["prompt"] for row in generate_rows(split, 1000, seed=1)} for split in SPLITS}
    assert all(split_of(prompt) == split for split in SPLITS for prompt in prompts[split])
    assert sum(map(len, prompts.values())) == len(set.union(*prompts.values())) == 3000
    assert generate_rows("train", 50, seed=1) == generate_rows("train", 50, seed=1)
    assert generate_rows("train", 50, seed=1) != generate_rows("train", 50, seed=2)


def test_one_problem_has_many_solutions_and_one_answer() -> None:
    rng = random.Random(0)
    problem = operation("*", operation("+", 1, 2), operation("+", 2, 3))
    written = {style: {write_solution(problem, rng, style) for _ in range(400)} for style in STYLES}
    # Two orders of the sums, and two orders of the operands in each of the three operations.
    assert len(written["equations"]) == 2 * 2**3
    assert written["rewriting"] == {"3*(2+3)=3*5=15#### 15", "(1+2)*5=3*5=15#### 15"}
    assert {final_answer(text) for texts in written.values() for text in texts} == {"15"}
    assert {"," in write_solution(problem, rng) for _ in range(50)} == {True, False}


def test_the_grader_reads_the_last_answer_only() -> None:
    assert is_correct("1+1=2#### 2", "2")
    assert is_correct("#### 3#### 2 ", "2")
    assert not is_correct("1+1=2#### 22", "2")
    assert not is_correct("2", "2")
    assert final_answer("1+1=2") is None


def test_tokenizer_round_trips_and_keeps_the_prompt_a_prefix(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    assert tokenizer.decode(tokenizer("  1  +  2 ####  3 ")["input_ids"]) == "  1  +  2 ####  3 "
    for row in generate_rows("train", 300, seed=5):
        text = row["prompt"] + row["completion"] + tokenizer.eos_token
        prompt, whole = tokenizer(row["prompt"])["input_ids"], tokenizer(text)["input_ids"]
        assert tokenizer.decode(whole) == text
        assert whole[: len(prompt)] == prompt
        assert whole[-1] == tokenizer.eos_token_id
        assert tokenizer.unk_token_id not in whole
        assert len(whole) <= tokenizer.model_max_length


def test_labels_are_the_completion_and_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = generate_rows("train", 8, seed=5)
    ids, labels = encode_rows(tokenizer, rows)
    for row, row_ids, row_labels in zip(rows, ids, labels, strict=True):
        is_label = row_labels >= 0
        assert tokenizer.decode(row_ids[is_label]) == row["completion"] + tokenizer.eos_token
        assert torch.equal(row_ids[is_label], row_labels[is_label])


def test_shipped_teacher_solves_unseen_problems(tokenizer: PreTrainedTokenizerFast) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(DEMO / "teacher").eval()
    assert teacher.dtype == torch.float32
    rows = shipped_rows("test.jsonl")[:100]
    completions = write_completions(teacher, tokenizer, [row["prompt"] for row in rows], sample=False)
    solved = sum(
        text is not None and is_correct(text, row["answer"])
        for text, row in zip(completions, rows, strict=True)
    )
    assert solved >= 97


def test_shipped_student_is_a_smaller_model_without_weights(tokenizer: PreTrainedTokenizerFast) -> None:
    student = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(DEMO / "student"))
    teacher = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(DEMO / "teacher"))
    assert 5 * student.num_parameters() < teacher.num_parameters()
    assert AutoTokenizer.from_pretrained(DEMO / "student").get_vocab() == tokenizer.get_vocab()
    assert not list((DEMO / "student").glob("*.safetensors"))


def test_shipped_data_are_well_formed_and_disjoint(tokenizer: PreTrainedTokenizerFast) -> None:
    train, validation, test = map(shipped_rows, ("train.jsonl.gz", "validation.jsonl.gz", "test.jsonl"))
    assert (len(train), len(validation), len(test)) == (24000, 500, 500)
    prompts = [{row["prompt"] for row in rows} for rows in (train, validation, test)]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 25000
    assert all(set(row) == COLUMNS for row in train + validation)
    assert all(set(row) == {"prompt", "answer"} for row in test)
    assert all(row["answer"] == str(eval(row["prompt"].rstrip("="))) for row in train + validation + test)
    texts = [row["prompt"] + row["completion"] for row in train + validation]
    assert all(tokenizer.unk_token_id not in ids for ids in tokenizer(texts)["input_ids"])
    assert sum(is_correct(row["completion"], row["answer"]) for row in train) >= 0.95 * len(train)


def test_the_demo_is_small() -> None:
    shipped = [path for path in DEMO.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in shipped) <= 4 * 2**20


def test_shipped_data_use_the_styles() -> None:
    completions = [row["completion"] for row in shipped_rows("train.jsonl.gz")]
    share_of_equations = sum("," in text for text in completions) / len(completions)
    assert 0.4 < share_of_equations < 0.6


def test_a_run_without_a_log_has_no_picture(tmp_path: Path) -> None:
    """`hpd demo train.max_steps=20` logs every 50 steps: it ended with an error behind its last step."""
    logs = tmp_path / "metrics.jsonl"
    logs.write_text('{"step": 20, "train_runtime": 1.0}\n{"step": 20, "eval_loss": 2.0}\n', encoding="utf-8")
    assert plot_training(tmp_path) is None
    logs.write_text('{"step": 50, "loss": 1.0}\n{"step": 100, "loss": 0.5}\n', encoding="utf-8")
    assert plot_training(tmp_path) == tmp_path / "training.png"
