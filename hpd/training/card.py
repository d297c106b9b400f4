"""The model card of a trained student: what it is, how to use it, and how it was made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hpd import __version__
from hpd.config.schema import Recipe

__all__ = ["Card", "card_of"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


@dataclass(frozen=True, kw_only=True)
class Card:
    """The facts of a card; paths on this machine may be among them, and are not written."""

    name: str
    student: str
    teacher: str
    method: str
    datasets: Sequence[str] = ()
    adapter: bool = False
    figures: Mapping[str, Any] | None = None
    """Measured values, by name."""
    recipe: str | None = None
    """The recipe that made the model, as YAML."""

    def text(self) -> str:
        """The card as Markdown, with the metadata that the Hub reads."""
        parts = [
            f"---\n{self._metadata()}---\n\n# {self.name}\n",
            f"{_public(self.student)} distilled from {_public(self.teacher)} with the method `{self.method}` "
            f"(hpd {__version__}).\n",
            f"## Use\n\n```python\n{self._snippet()}```\n",
        ]
        if self.figures:
            rows = "\n".join(f"| {name} | {value} |" for name, value in self.figures.items())
            parts.append(f"## Measured\n\n| measure | value |\n|---|---|\n{rows}\n")
        if self.recipe is not None:
            parts.append(f"## Recipe\n\n```yaml\n{self._public_recipe()}```\n")
        return "\n".join(parts)

    def _metadata(self) -> str:
        data = [name for name in dict.fromkeys(self.datasets) if _is_hub_id(name)]
        found: dict[str, Any] = {
            "library_name": "peft" if self.adapter else "transformers",
            "pipeline_tag": "text-generation",
            "tags": list(dict.fromkeys(["hpd", "distillation", self.method])),
        }
        if _is_hub_id(self.student):
            found["base_model"] = self.student
        if data:
            found["datasets"] = data
        if (license := _license(self.student)) is not None:
            found["license"] = license
        return yaml.safe_dump(found, sort_keys=False, allow_unicode=True)

    def _snippet(self) -> str:
        kind = "AutoPeftModelForCausalLM" if self.adapter else "AutoModelForCausalLM"
        load = f"from peft import {kind}\n" if self.adapter else ""
        names = "AutoTokenizer" if self.adapter else f"{kind}, AutoTokenizer"
        return (
            f"{load}from transformers import {names}\n\n"
            f'name = "{self.name}"  # this folder, or its id on the Hub\n'
            f"tokenizer, model = AutoTokenizer.from_pretrained(name), {kind}.from_pretrained(name)\n"
            'inputs = tokenizer("Your prompt", return_tensors="pt")\n'
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))\n"
        )

    def _public_recipe(self) -> str:
        tree = _without_folders(yaml.safe_load(self.recipe or "{}"))
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def card_of(recipe: Recipe, name: str, summary: Mapping[str, Any], text: str) -> Card:
    """The card of a run.

    Args:
        name: of the run folder.
        summary: its figures.
        text: its recipe as YAML.
    """
    data = [part.path for part in (recipe.data, *recipe.data.parts) if part.path]
    return Card(
        name=name,
        student=recipe.student.model,
        teacher=recipe.teacher.title,
        method=str(summary.get("method") or recipe.method or ("terms" if recipe.terms else "hpd")),
        datasets=data,
        adapter=recipe.lora is not None,
        figures={key: value for key, value in summary.items() if isinstance(value, (int, float, str))},
        recipe=text,
    )


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.match(name)) and "/" in name and not Path(name).exists()


def _public(name: str) -> str:
    """A model's name without the folders of this machine."""
    return re.sub(r"(?<!\S)(?:~|\.{1,2})?/[^\s,]*", lambda found: Path(found[0]).name, name)


def _without_folders(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _without_folders(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without_folders(value) for value in tree]
    return _public(tree) if isinstance(tree, str) and tree.startswith(("/", "~/")) else tree


def _license(student: str) -> str | None:
    """The license of the base model, where its card is on this machine: what is trained from it has the same
    one, or none that could be told here."""
    card: Any = Path(student) / "README.md"
    if not card.is_file() and _is_hub_id(student):
        from huggingface_hub import try_to_load_from_cache

        card = try_to_load_from_cache(student, "README.md")
    if not isinstance(card, (str, Path)) or not Path(card).is_file():
        return None
    head = re.match(r"---\n(.*?)\n---", Path(card).read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        found = yaml.safe_load(head[1]) if head is not None else None
    except yaml.YAMLError:
        return None
    license = found.get("license") if isinstance(found, dict) else None
    return license if isinstance(license, str) else None
