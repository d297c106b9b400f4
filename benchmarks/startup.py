"""Seconds from the start of the process to the first logged step: `hpd train` beside TRL's SFTTrainer.

    python benchmarks/startup.py [--repeats 5] [--json | --check]
    python benchmarks/startup.py --docs    # docs/performance.md from the stored result, nothing measured

The same tiny student, rows, tokenizer and step for both; `hpd train` also reads a recipe, compares the pair,
loads a teacher. Both find the rows tokenized, as from the second start on: one pair of runs before is not
counted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen
from typing import Any

import yaml
from timing import count, machine, ratios, replace_block, spread, store_or_check, stored, table

ROOT = Path(__file__).resolve().parent.parent

SFT_SCRIPT = """
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Stamp(TrainerCallback):
    def on_log(self, args, state, control, **kwargs):
        Path(sys.argv[1], "sft.stamp").touch()


folder = sys.argv[1]
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(f"{folder}/student", dtype=torch.float32),
    args=SFTConfig(
        output_dir=f"{folder}/sft", max_steps=1, per_device_train_batch_size=4, gradient_checkpointing=False,
        max_length=64, logging_steps=1, report_to="none", save_strategy="no", bf16=False, disable_tqdm=True,
    ),
    train_dataset=load_dataset("json", data_files=f"{folder}/rows.jsonl", split="train"),
    processing_class=AutoTokenizer.from_pretrained(f"{folder}/student"),
    callbacks=[Stamp()],
)
trainer.train()
"""


def prepare(folder: Path) -> None:
    """A tiny pair, rows, a recipe and the script."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import tiny_pair

    tiny_pair("llama", folder)
    rows = [{"prompt": f"add {i} and {i}:", "completion": f" {2 * i}"} for i in range(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "data": {"path": str(folder / "rows.jsonl")},
        "train": {
            "max_steps": 1,
            "per_device_train_batch_size": 4,
            "gradient_checkpointing": False,
            "max_length": 64,
            "logging_steps": 1,
            "save_strategy": "no",
        },
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "sft.py").write_text(SFT_SCRIPT)


def seconds_until(stamp: Path, command: list[str], folder: Path) -> float:
    """Start the command, and wait until `stamp` is written; the process is left to finish before this
    returns."""
    stamp.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    with (folder / "output.txt").open("w") as output:
        start = time.perf_counter()
        process = Popen(command, stdout=output, stderr=output, env=environment, cwd=folder)
        while not stamp.exists():
            if process.poll() is not None:
                sys.exit(
                    f"{' '.join(command)} ended without a "
                    f"step:\n{(folder / 'output.txt').read_text()[-2000:]}"
                )
            time.sleep(0.005)
        took = time.perf_counter() - start
        process.wait()
    return took


def tables(result: dict[str, Any]) -> str:
    """A stored result as docs/performance.md shows it."""
    found = result["ratios"]["startup"]
    rows = [[name, f"{ratio:.2f}", *spread(result["seconds"][name])] for name, ratio in found.items()]
    return table(["start", "x SFTTrainer script", "median s", "range s"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument(
        "--json", action="store_true", help="store the ratios in benchmarks/results/startup.json"
    )
    parser.add_argument("--check", action="store_true", help="compare with the stored ratios")
    parser.add_argument(
        "--docs", action="store_true", help="write the stored result into docs/performance.md, and stop"
    )
    options = parser.parse_args()
    if options.docs:
        replace_block("startup table", tables(stored("startup")))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        train = [sys.executable, "-m", "hpd", "train", "recipe.yaml", "--overwrite"]
        candidates: dict[str, Callable[[], float]] = {
            "SFTTrainer script": lambda: seconds_until(
                folder / "sft.stamp", [sys.executable, "sft.py", "."], folder
            ),
            "hpd train": lambda: seconds_until(folder / "run" / "metrics.jsonl", train, folder),
        }
        for run in candidates.values():
            run()
        # Not timing.interleaved: what is timed ends before the process does.
        rounds = [{name: run() for name, run in candidates.items()} for _ in range(options.repeats)]
    seconds = {name: [one[name] for one in rounds] for name in candidates}
    result = {
        "machine": machine(),
        "ratios": {"startup": ratios(seconds, "SFTTrainer script")},
        "seconds": seconds,
    }
    print(tables(result))
    store_or_check("startup", result, options.json, options.check)


if __name__ == "__main__":
    main()
