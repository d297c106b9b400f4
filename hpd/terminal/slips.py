"""Options that do not exist where a recipe's key was meant: `--max-steps 100` for train.max_steps=100."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any, get_args, get_type_hints

from typer.core import TyperCommand

from hpd.terminal.errors import user_errors

__all__ = ["RecipeCommand"]


class RecipeCommand(TyperCommand):
    """A command that takes overrides; an unknown option is answered with the override that was meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        for place, word in enumerate(args):
            if word == "--":
                break
            name, sign, value = word.partition("=")
            if not name.startswith("--") or name in known or get_close_matches(name, known, n=1, cutoff=0.85):
                continue
            following = args[place + 1 : place + 2]
            if not sign and following and not following[0].startswith("-"):
                value = following[0]
            with user_errors():
                self._explain(name, value)
        return super().parse_args(ctx, args)

    def _explain(self, option: str, value: str) -> None:
        """Raise ValueError where the option is a recipe's key; others are left to typer."""
        meant = meant_key(option.lstrip("-").replace("-", "_"))
        if meant is not None:
            of_grid = self.name == "compare"
            prefix = "set." if of_grid else ""
            raise ValueError(
                f"There is no option {option}. Values of the {'experiment' if of_grid else 'recipe'} are "
                f"written without dashes: hpd {self.name} ... {prefix}{meant}={value or 'VALUE'}"
            )


def meant_key(name: str) -> str | None:
    """The key of a recipe that a name means: its last part, or a word that people use for it."""
    # They load torch, which takes seconds that a command without a mistake does not spend.
    from hpd.config.schema import Recipe
    from hpd.config.slips import trainer_name
    from hpd.training.arguments import DistillConfig

    if (field := trainer_name(name)) is not None:
        return f"train.{field}"
    keys = list(_keys(Recipe, ()))
    keys += [("train", field.name) for field in fields(DistillConfig) if field.init]
    by_name: dict[str, tuple[str, ...]] = {}
    for key in sorted(keys, key=len, reverse=True):
        by_name[key[-1]] = by_name["_".join(key)] = key
        by_name[".".join(key)] = key
    found = [name] if name in by_name else get_close_matches(name, by_name, n=1, cutoff=0.8)
    return ".".join(by_name[found[0]]) if found else None


def _keys(section: type, path: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Fields of a section and of the sections in it, one level down: `data.path`, `lora.r`."""
    for name, hint in get_type_hints(section).items():
        yield (*path, name)
        if not path:
            for part in (hint, *get_args(hint)):
                if isinstance(part, type) and is_dataclass(part):
                    yield from _keys(part, (name,))
