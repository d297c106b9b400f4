"""The packaged recipe of `hpd demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent


def demo_recipe(output_dir: Path) -> dict[str, Any]:
    """The packaged recipe, its paths made absolute."""
    tree = yaml.safe_load((FOLDER / "recipe.yaml").read_text(encoding="utf-8"))
    tree["student"]["model"] = str(FOLDER / tree["student"]["model"])
    tree["teacher"] = str(FOLDER / tree["teacher"])
    tree["output_dir"] = str(output_dir)
    for section, key in (("data", "path"), ("data", "validation"), ("eval", "data")):
        tree[section][key] = str(FOLDER / tree[section][key])
    return tree
