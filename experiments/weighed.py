"""The base of weighed.yaml: `chain_inits`, and for each teacher caches of its draws next to its states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpd.config.load import load_recipe
from hpd.experiments.tasks.inits import NUM_TEACHERS, chain_inits
from hpd.training.caching import write_cache

DRAWS = (2, 4)


def weighed(folder: Path) -> dict[str, Any]:
    """The recipe of teacher 0 and student 0; `$BASE/teacher-N/sampled-2` and `sampled-4` are caches."""
    tree = chain_inits(folder)
    for number in range(NUM_TEACHERS):
        own = folder / f"teacher-{number}"
        for draws in DRAWS:
            source = {"type": "cached", "model": str(own / "model"), "path": str(own / "cache")}
            data = {
                **tree["data"],
                "path": str(own / "rows" / "own.jsonl"),
                "validation": str(own / "validation.jsonl"),
            }
            cache = {"path": str(own / f"sampled-{draws}"), "kind": "sampled", "draws": draws}
            write_cache(load_recipe({**tree, "teacher": source, "data": data, "cache": cache}))
    return tree
