"""From offline to on-policy on the demo's task: recipes/regimes/*.yaml one by one, as a table and a picture.

    python benchmarks/regimes.py --steps 300    # runs, writes benchmarks/results/regimes.json, prints, draws
    python benchmarks/regimes.py --draw         # only table and picture, from the json
    python benchmarks/regimes.py --tiny --steps 2 --folder FOLDER    # whether it runs; all of it in FOLDER

Cost is the processor time of the training loop (all threads, generation and teacher included; evaluation and
imports are not), which other work on the machine moves less than wall time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "regimes.json"
PICTURE = ROOT / "docs" / "images" / "regimes.png"
RUNS = {
    "offline_hpd": "offline HPD",
    "continue_4": "HPD, continue_tokens 4",
    "gkd": "GKD mix (half)",
    "hpd_then_opd": "HPD, then OPD",
    "opd": "OPD",
}
# Rollouts on which the KL of the student's own text is measured.
_OWN_TEXT_ROWS = 200
_ROWS = 64  # of a step
# A few rows, and answers of a few tokens.
_TINY = [
    "data.limit=8",
    "data.validation=0.25",
    "train.per_device_train_batch_size=4",
    "train.warmup_steps=0",
]
_TINY += ["train.per_device_eval_batch_size=2", "eval.limit=2", "eval.max_new_tokens=4"]


def measure(name: str, steps: int, folder: Path, tiny: bool = False) -> dict[str, Any]:
    """Train one recipe and measure its student."""
    from transformers import TrainerCallback

    from hpd.config import load_recipe
    from hpd.progress import Progress
    from hpd.training.run import train

    class Clock(TrainerCallback):
        seconds = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self._start = time.process_time()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds += time.process_time() - self._start

    clock = Clock()

    class Timed(Progress):
        def callbacks(self) -> Sequence[TrainerCallback]:
            return (clock,)

    staged = name == "hpd_then_opd"
    settings = [f"train.max_steps={steps // 2 if staged else steps}", f"output_dir={folder / name}"]
    settings += _TINY if tiny else []
    summary = train(
        load_recipe(ROOT / "recipes" / "regimes" / f"{name}.yaml", settings), overwrite=True, progress=Timed()
    )
    stages = summary.get("stages", {"": summary})
    student = folder / name / list(stages)[-1]
    return {
        "accuracy": summary["student after accuracy"],
        "forward_kl": summary["forward_kl after"],
        "own_text_kl": own_text_kl(student, ROOT / "hpd" / "demo" / "teacher", 2 if tiny else _OWN_TEXT_ROWS),
        "generated_tokens": sum(stage.get("generated tokens", 0) for stage in stages.values()),
        "cpu_seconds": round(clock.seconds, 1),
        "wall_seconds": summary["train seconds"],
    }


def own_text_kl(student_path: Path, teacher_path: Path, num_rows: int) -> float:
    """Mean KL(student || teacher) per token of text that the student writes to held-out prompts, in nats."""
    import torch
    from accelerate import Accelerator
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hpd.batch import uniforms
    from hpd.generation.rollouts import make_engine
    from hpd.methods.prefixes import RolloutConfig
    from hpd.objectives.estimators import kl_estimate

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path).eval() for path in (student_path, teacher_path)
    )
    tokenizer = AutoTokenizer.from_pretrained(student_path)
    file = str(ROOT / "hpd" / "demo" / "data" / "validation.jsonl.gz")
    prompts = [
        tokenizer(p)["input_ids"]
        for p in load_dataset("json", data_files=file, split="train")["prompt"][:num_rows]
    ]
    engine = make_engine(
        RolloutConfig(batch_size=100), lambda: student, student, Accelerator(cpu=True), tokenizer, None
    )
    numbers = uniforms(torch.arange(len(prompts)), seed=0, step=0, count=40)
    total, count = 0.0, 0
    for prompt, rollout in zip(
        prompts, engine.generate(prompts, [40] * len(prompts), numbers, 0), strict=True
    ):
        ids = torch.tensor([prompt + rollout.tokens])
        with torch.no_grad():
            sides = [
                m(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (teacher, student)
            ]
        total += float(kl_estimate("exact", *sides).sum())
        count += len(rollout.tokens)
    return round(total / count, 4)


def table(results: dict[str, Any]) -> str:
    """The table of docs/evidence/on-policy.md."""
    lines = [
        "| recipe | accuracy | KL(teacher, student), held-out text | KL(student, teacher), own text | tokens "
        "written | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for name, label in RUNS.items():
        if row := results["runs"].get(name):
            lines.append(
                f"| `{name}`: {label} | {row['accuracy']:.1%} | {row['forward_kl']:.3f} | "
                f"{row['own_text_kl']:.3f} | {row['generated_tokens']:,} | {row['cpu_seconds']:.0f} |"
            )
    return "\n".join(lines)


def draw(results: dict[str, Any], picture: Path) -> None:
    """Cost against on-policyness, and what became of the student."""
    from matplotlib.figure import Figure

    runs = {name: results["runs"][name] for name in RUNS if name in results["runs"]}
    figure = Figure(figsize=(11.0, 3.6), layout="constrained")
    cost, *panels = figure.subplots(1, 3, width_ratios=[1.5, 1, 1])
    for name, row in runs.items():
        point = (
            row["generated_tokens"] / (results["steps"] * _ROWS),
            1000 * row["cpu_seconds"] / results["steps"],
        )
        cost.scatter(*point, s=45, color="#4c72b0", zorder=3)
        cost.annotate(RUNS[name], point, xytext=(7, -11), textcoords="offset points", fontsize=8)
    cost.set_xlabel("on-policyness: tokens written per row", fontsize=8)
    cost.set_title("cost: CPU ms per step", fontsize=9, loc="left")
    cost.set_xlim(-1, 1.45 * cost.get_xlim()[1])
    cost.set_ylim(0, None)
    cost.grid(alpha=0.25)
    for number, (axis, title, key) in enumerate(
        zip(
            panels,
            ("KL(student, teacher), own text", "KL(teacher, student), held-out text"),
            ("own_text_kl", "forward_kl"),
            strict=True,
        )
    ):
        values = [row[key] for row in runs.values()]
        axis.bar_label(
            axis.barh(range(len(values)), values, color="#c44e52"),
            [f"{v:.2f}" for v in values],
            fontsize=8,
            padding=2,
        )
        axis.set_yticks(range(len(values)), [RUNS[n] if number == 0 else "" for n in runs], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.2 * max(values))
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel("nats per token", fontsize=8)
    for axis in (cost, *panels):
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "regimes")
    parser.add_argument("--draw", action="store_true", help="Only table and picture, from the json.")
    parser.add_argument("--runs", default=",".join(RUNS), help="Some of the recipes, with --tiny.")
    parser.add_argument("--tiny", action="store_true", help="A few rows: whether the script runs.")
    options = parser.parse_args()
    if not options.tiny and options.runs != ",".join(RUNS):
        parser.error("--runs leaves recipes out, which the stored result must hold: it needs --tiny.")
    stored, picture = RESULTS, PICTURE
    if options.tiny:
        stored, picture = options.folder / "regimes.json", options.folder / "regimes.png"
        options.folder.mkdir(parents=True, exist_ok=True)
    if not options.draw:
        results: dict[str, Any] = {"steps": options.steps, "runs": {}}
        for name in options.runs.split(","):
            results["runs"][name] = measure(name, options.steps, options.folder, options.tiny)
            stored.write_text(json.dumps(results, indent=2) + "\n")
            print(name, results["runs"][name], flush=True)
    results = json.loads(stored.read_text())
    print(table(results))
    draw(results, picture)


if __name__ == "__main__":
    main()
