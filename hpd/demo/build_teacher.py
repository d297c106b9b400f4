"""Rebuilds what the demo ships: teacher, student shape, tokenizer and data, from nothing but a seed.

``python -m hpd.demo.build_teacher --output DIR`` takes about 10 minutes on two CPU cores and ends by
measuring the teacher. Equal seeds give equal files on one machine and one version of PyTorch; elsewhere
rounding moves single samples.

Shapes: B rows, T tokens, V vocabulary.
"""

import argparse
import gzip
import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hpd.demo.task import (
    ANSWER_MARK,
    SolvedProblem,
    draw_problem,
    generate_rows,
    is_correct,
    prompt_of,
    write_solution,
)

SEED = 0
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
VOCABULARY = (PAD, EOS, UNKNOWN, ANSWER_MARK, *"0123456789+-*()=, ")
MAX_TOKENS = 64
IGNORED = -100

TEACHER_SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
STUDENT_SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    # Llama's 0.02 is for wide models. At a width of 48 a start so near to zero costs a fifth of the steps.
    "initializer_range": 0.08,
}

NUM_STEPS = 2000
BATCH_SIZE = 128
PEAK_LEARNING_RATE = 2e-3
NUM_WARMUP_STEPS = 200
MAX_GRADIENT_NORM = 1.0

NUM_TRAIN_ROWS, NUM_VALIDATION_ROWS, NUM_TEST_ROWS = 24000, 500, 500
WRITING_BATCH_SIZE = 250
MAX_COMPLETION_TOKENS = 48


def build_tokenizer() -> Any:
    """One token per character, except the answer mark, which is one token too.

    Characters never merge, so a tokenized prompt is always a prefix of the tokenized prompt and completion.
    """
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token=UNKNOWN)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{ANSWER_MARK}|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="right",
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def model_config(tokenizer: Any, shape: Mapping[str, Any]) -> LlamaConfig:
    """A Llama of the given shape with tied embeddings, over the demo's vocabulary."""
    return LlamaConfig(
        **shape,
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def encode_rows(
    tokenizer: Any, rows: Sequence[SolvedProblem]
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Token ids and labels of prompt, completion and end; prompt and padding are not labels."""
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    completions = [tokenizer(row["completion"] + EOS)["input_ids"] for row in rows]
    length = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), IGNORED)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        ids[i, :end] = torch.tensor(prompt + completion)
        labels[i, len(prompt) : end] = torch.tensor(completion)
    return ids, labels


def problem_stream(seed: int) -> Iterator[SolvedProblem]:
    """Endless training problems with right solutions, repeats included."""
    rng = random.Random(f"teacher-{seed}")
    while True:
        problem = draw_problem(rng, "train")
        yield SolvedProblem(
            prompt=prompt_of(problem), completion=write_solution(problem, rng), answer=str(problem.value)
        )


def train_teacher(tokenizer: PreTrainedTokenizerFast, seed: int, num_steps: int) -> LlamaForCausalLM:
    """Train a teacher with the next-token loss on completions: AdamW, linear warm-up, cosine to 0."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config(tokenizer, TEACHER_SHAPE)).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )

    def learning_rate_factor(step: int) -> float:
        return min((step + 1) / NUM_WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * step / num_steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)
    stream, start = problem_stream(seed), time.monotonic()
    for step in range(1, num_steps + 1):
        ids, labels = encode_rows(tokenizer, [next(stream) for _ in range(BATCH_SIZE)])
        # Padding stands on the right, where causal attention never looks at it: no attention mask needed.
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 250 == 0:
            print(
                f"step {step}  loss {loss.item():.4f} nats/token  {time.monotonic() - start:.0f} s",
                flush=True,
            )
    return model.eval()


@torch.inference_mode()
def write_completions(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, sample: bool
) -> list[str | None]:
    """Let a model complete prompts, greedily or sampled at temperature 1; None for one that does not end."""
    completions: list[str | None] = []
    for start in range(0, len(prompts), WRITING_BATCH_SIZE):
        batch = list(prompts[start : start + WRITING_BATCH_SIZE])
        inputs = tokenizer(batch, return_tensors="pt", padding=True, padding_side="left")
        written = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=MAX_COMPLETION_TOKENS,
            do_sample=sample,
            **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}),
        )
        for ids in written[:, inputs["input_ids"].shape[1] :]:
            finished = bool((ids == tokenizer.eos_token_id).any())
            completions.append(tokenizer.decode(ids, skip_special_tokens=True) if finished else None)
    return completions


def teacher_rows(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[SolvedProblem],
    num_rows: int,
) -> list[SolvedProblem]:
    """The first ``num_rows`` problems that the teacher finishes, with its own sampled completions.

    Wrong answers stay in: the data are what a teacher writes, unfiltered, as where no grader exists.
    """
    completions = write_completions(model, tokenizer, [row["prompt"] for row in problems], sample=True)
    rows = [
        SolvedProblem(prompt=row["prompt"], completion=completion, answer=row["answer"])
        for row, completion in zip(problems, completions, strict=True)
        if completion is not None
    ]
    if len(rows) < num_rows:
        raise RuntimeError(
            f"the teacher finished {len(rows)} of {len(problems)} completions, not {num_rows}: train it "
            "longer"
        )
    return rows[:num_rows]


def write_rows(path: Path, rows: Sequence[SolvedProblem], columns: Sequence[str]) -> None:
    """Write JSON Lines; gzipped (.gz) without a time stamp, so that equal rows give equal files."""
    chosen = [{key: value for key, value in row.items() if key in columns} for row in rows]
    text = "".join(json.dumps(row) + "\n" for row in chosen)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())


def save_student(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the student's shape and tokenizer; its weights start at random."""
    model_config(tokenizer, STUDENT_SHAPE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build(output: Path, seed: int = SEED, num_steps: int = NUM_STEPS) -> None:
    """Make everything and print how good the teacher is."""
    tokenizer = build_tokenizer()
    teacher = train_teacher(tokenizer, seed, num_steps)
    test = generate_rows("test", NUM_TEST_ROWS, seed)
    for sample in (False, True):
        written = write_completions(teacher, tokenizer, [row["prompt"] for row in test], sample=sample)
        right = sum(is_correct(text or "", row["answer"]) for text, row in zip(written, test, strict=True))
        print(
            f"{'sampled' if sample else 'greedy'}: {right / len(test):.1%} of {len(test)} unseen problems",
            flush=True,
        )
    # A few more problems than rows: not every sampled completion comes to an end.
    for split, num_rows in (("train", NUM_TRAIN_ROWS), ("validation", NUM_VALIDATION_ROWS)):
        # A seed of their own: the rows then follow from the teacher's weights alone.
        torch.manual_seed(seed)
        problems = generate_rows(split, num_rows + num_rows // 20, seed)  # type: ignore[arg-type]
        rows = teacher_rows(teacher, tokenizer, problems, num_rows)
        write_rows(output / "data" / f"{split}.jsonl.gz", rows, ("prompt", "completion", "answer"))
    write_rows(output / "data" / "test.jsonl", test, ("prompt", "answer"))
    teacher.save_pretrained(output / "teacher")
    tokenizer.save_pretrained(output / "teacher")
    save_student(tokenizer, output / "student")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, required=True, help="Folder that gets teacher/, student/ and data/."
    )
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    arguments = parser.parse_args()
    build(arguments.output, arguments.seed, arguments.steps)


if __name__ == "__main__":
    main()
