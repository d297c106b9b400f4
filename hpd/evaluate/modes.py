"""What `hpd eval` does with its options: our tasks, metrics of the distribution, or another harness."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["run_eval"]

_METRICS_USE = (
    "models", "data", "limit", "generation", "dtype", "output", "metrics", "metrics_on", "teacher", "vocabulary",
)  # fmt: skip
_HARNESS_USES = (
    "models", "tasks", "data", "limit", "generation", "few_shot", "dtype", "output", "harness",
)  # fmt: skip
_TASKS_USE = (
    "models", "tasks", "data", "limit", "limit_seed", "preset", "generation", "few_shot", "few_shot_data", "options",
    "judge_url", "judge_model", "engine", "tensor_parallel", "dtype", "output",
)  # fmt: skip
_UNSET: dict[str, Any] = {"tasks": "exact-match", "few_shot": 0, "options": (), "engine": "transformers", "tensor_parallel": 1}


def run_eval(**given: Any) -> None:
    """`hpd eval` with the options of the command line, by their names there.

    Raises:
        ValueError: an option that the chosen mode does not use.
    """
    if given["metrics"] is not None and given["harness"] is not None:
        raise ValueError("--metrics and --harness are different evaluations: give one of them.")
    if given["metrics"] is not None:
        _require_used(given, _METRICS_USE, "--metrics")
        _metrics(given)
    elif given["harness"] is not None:
        _require_used(given, _HARNESS_USES, "--harness")
        _harness(given)
    else:
        _require_used(given, _TASKS_USE, "an evaluation of tasks")
        _tasks(given)


def _require_used(given: Mapping[str, Any], used: tuple[str, ...], mode: str) -> None:
    unused = [name for name, value in given.items() if name not in used and value != _UNSET.get(name)]
    if unused:
        raise ValueError(f"--{unused[0].replace('_', '-')} has no effect on {mode}; leave it out.")


def _tasks(given: Mapping[str, Any]) -> None:
    from hpd.evaluate.build import build_tasks
    from hpd.evaluate.command import EvalCommand
    from hpd.evaluate.display import evaluate_with_display, judging_bar

    judge = [f"judge.{name}={given[f'judge_{name}']}" for name in ("url", "model") if given[f"judge_{name}"] is not None]
    tasks = build_tasks(
        given["tasks"], given["data"], [*given["options"], *judge], limit=given["limit"], limit_seed=given["limit_seed"],
        few_shot=given["few_shot"], few_shot_data=given["few_shot_data"], judge_progress=judging_bar,
    )  # fmt: skip
    names = ("models", "preset", "generation", "engine", "tensor_parallel", "dtype", "output")
    evaluate_with_display(EvalCommand(tasks=tasks, **{name: given[name] for name in names}))


def _metrics(given: Mapping[str, Any]) -> None:
    from hpd.evaluate.metrics_display import measure_with_display

    measure_with_display(
        given["models"], given["teacher"], given["data"], given["metrics"],
        texts=given["metrics_on"] or "dataset,student", vocabulary=given["vocabulary"] or "error", limit=given["limit"],
        generation=given["generation"], dtype=given["dtype"], output=given["output"],
    )  # fmt: skip


def _harness(given: Mapping[str, Any]) -> None:
    from hpd.display import console
    from hpd.evaluate.display import harness_table
    from hpd.evaluate.harness import HARNESSES, run_harness
    from hpd.train import quiet_libraries

    if given["harness"] not in HARNESSES:
        raise ValueError(f"Unknown harness {given['harness']!r}; known: {', '.join(HARNESSES)}.")
    quiet_libraries()
    generation = dict(given["generation"])
    unused = [key for key in ("num_samples", "top_k") if generation[key] is not None]
    if unused or generation["seed"]:
        raise ValueError(f"{(unused or ['seed'])[0]} is not passed on to lm-eval; leave it out.")
    sampling = {key: generation[key] for key in ("temperature", "top_p") if generation[key] is not None}
    if sampling.get("temperature"):
        sampling["do_sample"] = True
    if generation["max_new_tokens"] is not None:
        sampling["max_gen_toks"] = generation["max_new_tokens"]
    tasks = [name.strip() for name in given["tasks"].split(",") if name.strip()]
    for model in given["models"]:
        found = run_harness(
            model, tasks, include=given["data"], limit=given["limit"], num_few_shot=given["few_shot"] or None,
            batch_size=generation["batch_size"], dtype=given["dtype"], generation=sampling,
            chat_template=generation["chat_template"] == "always", system_prompt=generation["system_prompt"],
        )  # fmt: skip
        console.print(harness_table(Path(model).name, found))
        identity = {"model": model, "harness": "lm-eval", "tasks": tasks, "limit": given["limit"],
                    "few_shot": given["few_shot"], "settings": generation}  # fmt: skip
        _keep(given["output"], identity, {"results": found})


def _keep(folder: Path | None, identity: dict[str, Any], figures: dict[str, Any]) -> None:
    """Into evals.json, in place of an earlier entry of the same identity."""
    from hpd.evaluate.run import write_entry

    if folder is not None:
        eval_id = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        write_entry(folder, {"id": eval_id, **identity, **figures})
