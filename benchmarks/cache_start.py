"""Seconds from the start of the process to the first logged step, with a cached and with a live teacher.

    python benchmarks/cache_start.py [--gigabytes 1] [--repeats 3]

A start depends on how much the cache holds, not on what its numbers say: the teacher is one layer of random
weights, as wide as SmolLM2-135M, over a tiny vocabulary, and rows have about as many label tokens as GSM8K's.
The rows are tokenized already, as from the second start on; what is timed is the rest: imports, models, the
cache's index, and finding every position of every row in it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import yaml
from startup import prepare, seconds_until
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

HIDDEN, LABELS = 576, 120


def make(folder: Path, gigabytes: float) -> tuple[int, int]:
    """Pair, rows, recipe; returns the numbers of rows and of label positions asked for."""
    prepare(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    shape = {
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 9,
    }
    vocab = json.loads((folder / "student" / "config.json").read_text())["vocab_size"]
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=vocab, pad_token_id=0)).save_pretrained(folder / "wide")
    tokenizer.save_pretrained(folder / "wide")
    rng, text = random.Random(0), ""
    while len(tokenizer(text)["input_ids"]) < LABELS:
        text += f" {rng.randint(0, 99)} and"
    words = text.split()
    num_rows = round(gigabytes * 1e9 / (4 * HIDDEN + 4) / LABELS)
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(num_rows):
            rng.shuffle(words)
            file.write(json.dumps({"prompt": f"add {i}:", "completion": " " + " ".join(words)}) + "\n")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["train"] |= {"max_length": 4 * LABELS}
    recipe |= {"teacher": str(folder / "wide"), "cache": {"path": str(folder / "stored"), "dtype": "float32"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return num_rows, num_rows * LABELS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_rows, _ = make(folder, options.gigabytes)
        started = time.perf_counter()
        seconds_until(
            folder / "stored" / "cache.json", [sys.executable, "-m", "hpd", "cache", "recipe.yaml"], folder
        )
        print(f"hpd cache: {num_rows:,} rows in {time.perf_counter() - started:.0f} s", flush=True)
        size = sum(file.stat().st_size for file in (folder / "stored").iterdir())
        train = [sys.executable, "-m", "hpd", "train", "recipe.yaml", "--overwrite"]
        commands = {"live": train, f"cached, {size / 1e9:.2f} GB": [*train, "teacher.type=cached"]}
        for name, command in commands.items():
            taken = [
                seconds_until(folder / "run" / "metrics.jsonl", command, folder)
                for _ in range(options.repeats + 1)
            ][1:]
            print(
                f"{name}: first step after {statistics.median(taken):.1f} s ({min(taken):.1f} to "
                f"{max(taken):.1f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
