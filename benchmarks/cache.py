"""Cost and loss of each kind of cache: bytes per position, error of log p, branches of HPD that change.

    python benchmarks/cache.py RECIPE data.path=train.jsonl.gz data.limit=60 [--folder FOLDER]

The teacher is asked once, into a float32 cache; every other kind is written from that one. Errors are those
of log p, in nats, at the labels and at one token drawn from the student at each position. HPD looks at the
sign of log p - log q there.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hpd import DistillTrainer
from hpd.batch import TokenBatch, uniforms
from hpd.config import Recipe, load_recipe
from hpd.losses.products import logits
from hpd.losses.teacher_side import log_normalizer, token_logprobs
from hpd.methods.sampling import inverse_cdf
from hpd.models import load_model
from hpd.models.forward import scores_of
from hpd.teachers import CachedTeacher
from hpd.training.caching import write_cache
from hpd.training.plan import plan

KINDS = {
    "hidden float32": ["cache.dtype=float32"],
    "hidden bfloat16": ["cache.dtype=bfloat16"],
    "hidden float16": ["cache.dtype=float16"],
    "hidden int8": ["cache.dtype=int8"],
    "top_k 64 float32": ["cache.kind=top_k", "cache.top_k=64", "cache.dtype=float32"],
    "top_k 64 float16": ["cache.kind=top_k", "cache.top_k=64", "cache.dtype=float16"],
}


class Reading(NamedTuple):
    """Log-probabilities at the label (column 0) and the draw (column 1) of every position."""

    teacher: dict[str, Tensor]
    student: Tensor


def read(recipe: Recipe, teachers: dict[str, CachedTeacher]) -> Reading:
    planned = plan(recipe)
    trainer = DistillTrainer(
        model=load_model(recipe.student, "student"),
        teacher=next(iter(teachers.values())),
        args=planned.args,
        train_dataset=planned.rows.train,
        processing_class=planned.tokenizer,
    )
    trainer.data_collator.ask = None
    found: dict[str, list[Tensor]] = {name: [] for name in teachers}
    own = []
    for inputs in trainer.get_train_dataloader():
        batch = TokenBatch.pop(inputs)
        log_q = logits(scores_of(trainer.model, inputs, batch.index)).log_softmax(-1)
        draws = inverse_cdf(log_q.exp(), uniforms(batch.keys, seed=0, step=0, count=1))
        tokens = torch.cat([batch.labels[:, None], draws], dim=1)
        own.append(log_q.gather(1, tokens))
        for name, teacher in teachers.items():
            scores = teacher.scores(inputs, batch)
            log_z = log_normalizer(scores, batch.labels, scores.vocab)
            found[name].append(token_logprobs(scores, log_z, batch.labels, tokens))
    return Reading({name: torch.cat(parts) for name, parts in found.items()}, torch.cat(own))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--folder", type=Path, help="keep the caches here")
    options = parser.parse_intermixed_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    overrides = [*options.overrides, "data.validation=null"]
    exact, sizes = folder / "hidden-float32", {}
    for name, changes in KINDS.items():
        place = folder / name.replace(" ", "-")
        source = [] if place == exact else ["teacher.type=cached", f"teacher.path={exact}"]
        started = time.perf_counter()
        summary = write_cache(
            load_recipe(options.recipe, [*overrides, *source, *changes, f"cache.path={place}"])
        )
        sizes[name] = summary.bytes_per_position
        print(f"{name}: {summary.positions} positions in {time.perf_counter() - started:.1f} s", flush=True)
    recipe = load_recipe(options.recipe, [*overrides, "teacher.type=cached", f"cache.path={exact}"])
    reading = read(recipe, {name: CachedTeacher(folder / name.replace(" ", "-")) for name in KINDS})
    truth = reading.teacher["hidden float32"]
    print(
        "\n| kind | bytes per position | error at labels, mean (max), nats | at draws | branches changed at "
        "labels | at draws |"
    )
    print("|---|---|---|---|---|---|")
    for name, found in reading.teacher.items():
        error = (found - truth).abs()
        changed = ((found > reading.student) != (truth > reading.student)).double().mean(0)
        cells = [f"{error[:, i].mean():.1e} ({error[:, i].max():.1e})" for i in range(2)]
        print(f"| {name} | {sizes[name]:,} | {' | '.join(cells)} | {changed[0]:.2%} | {changed[1]:.2%} |")


if __name__ == "__main__":
    main()
