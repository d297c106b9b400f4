"""What a step costs on the first share of each answer, as a ratio to the whole answer within one run.

    python benchmarks/first_share.py --data train.jsonl.gz [--student FOLDER --teacher FOLDER --shares 0.1]

Steps of the trainer (both models forward, the operator, backward, optimizer) on the same batches, rows one
behind the other; the shares take turns batch by batch, so that whatever else the machine does meets all of
them. Printed are medians of each step's time divided by that of the whole answer on the same batch, and the
tokens that the bodies and the heads read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpd import DistillConfig, DistillTrainer
from hpd.batch import TokenBatch
from hpd.training.cutting import cut_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="rows with question and answer")
    parser.add_argument("--student", default="models/smollm2-135m-10l")
    parser.add_argument("--teacher", default="models/smollm2-135m")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.3, 0.5])
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--rows", type=int, default=4, help="of a batch")
    given = parser.parse_args()
    rows = load_dataset("json", data_files=given.data, split=f"train[:{given.batches * given.rows}]")
    rows = rows.rename_columns({"question": "prompt", "answer": "completion"})  # type: ignore[union-attr]
    load = AutoModelForCausalLM.from_pretrained
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillTrainer(
            load(given.student, dtype=torch.float32), load(given.teacher, dtype=torch.float32), "forward_kl",
            args=DistillConfig(
                output_dir=folder, per_device_train_batch_size=given.rows, padding_free=True, max_length=None,
                report_to="none", gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(given.student),
        )  # fmt: skip
        trainer.create_optimizer()
        print(json.dumps(measure(trainer, given.shares), indent=1))


def measure(trainer: DistillTrainer, shares: list[float]) -> dict[str, dict[str, float]]:
    """Ratios of time and counts of tokens, by share."""
    ratios: dict[float, list[float]] = {share: [] for share in shares}
    read: dict[float, list[int]] = {share: [0, 0] for share in (*shares, 1.0)}
    step(trainer, next(iter(trainer.get_train_dataloader())))  # first calls are slow
    for batch in trainer.get_train_dataloader():
        seconds = {}
        for share in (1.0, *shares):
            some = batch if share == 1.0 else cut_batch(batch, share)
            read[share][0] += some["input_ids"].numel()
            read[share][1] += len(some["label_index"])
            seconds[share] = step(trainer, some)
        for share in shares:
            ratios[share].append(seconds[share] / seconds[1.0])
    return {
        str(share): {
            "step": round(statistics.median(ratios[share]), 3) if share < 1.0 else 1.0,
            "body_tokens": round(read[share][0] / read[1.0][0], 3),
            "head_positions": round(read[share][1] / read[1.0][1], 3),
        }
        for share in (*shares, 1.0)
    }


def step(trainer: DistillTrainer, batch: dict) -> float:
    """Seconds of a step on a batch."""
    count = TokenBatch.pop(dict(batch)).labels.numel()
    began = time.perf_counter()
    loss = trainer.compute_loss(trainer.model.train(), dict(batch), num_items_in_batch=count)
    trainer.accelerator.backward(loss)
    assert trainer.optimizer is not None
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    float(loss.detach())
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
