"""Write docs/methods.md and what `hpd methods` shows, or --check them."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

from hpd.methods import METHODS, Method, name_terms
from hpd.methods.position_rules import PositionRule
from hpd.methods.terms import SUPPORTS, TermConfig, parameters_of
from hpd.objectives import OBJECTIVES
from hpd.terminal.methods import FACTS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "methods.md"
COSTS = ROOT / "benchmarks" / "results" / "head.json"

_HEAD = """# Methods

Every method: what it learns, when to use it, its parameters and its source.

    hpd methods hpd

In a recipe: `method: NAME`, parameters under `method_kwargs`. On the command line: `hpd train recipe.yaml
method=NAME method_kwargs.PARAMETER=VALUE`. In Python: `DistillTrainer(..., method="NAME",
method_kwargs={...})`. [Which method?](start/which-method.md) helps to choose.

Every method runs through the same operator. The loss is `- sum w(v) log q(v)` over the support, w a constant
for the gradient; p is the teacher, q the student, y the label, a a token drawn from the student,
k = q (log p - log q). [How the loss is computed](concepts/loss.md) says more. `python scripts/make_docs.py`
writes this page from `METHODS` and `OBJECTIVES`.

**Needs** is what the teacher must give at each label position: the label's log-probability (in text that the
student wrote, the label is the written token), that of a token which student or teacher draws, or the whole
distribution. The whole vocabulary can be replaced by a `top_k` support.
{loss_time}
"""

_ALL = "whole distribution"
_ONE_TOKEN, _WHOLE = "One token a position", "The whole vocabulary"
_OWN_TEXT, _POLICY = "The student's own text", "Policy gradients and clipped ratios"
_ORDER = (_ONE_TOKEN, _WHOLE, _OWN_TEXT, _POLICY)

_TAIL = """
## Supports

| support | meaning | fields of a term |
|---|---|---|
| `full` | every token | |
| `label` | the dataset's token | |
| `sampled` | samples, weight / probability | `num_samples`, `draws_of`, `draw_temperature`, `importance` |
| `label+sampled` | the label, and draws that differ from it | the same, `sample_fraction`, `exclude_label` |
| `rollout` | the token that the student wrote, weight divided by its probability; needs `on: student` | |
| `top_k` | the k likeliest, and the tail | `top_k`, `top_k_of`, `tail` (`bucket`, `renormalize`, `drop`) |
| `label+top_k` | the same, the label always among them | the same |
| `label+full` | the label, and every token (hpd_expected) | |
| `ranks` | between two tokenizers: the i-th likeliest token of either | |
| `shared`, `unshared` | between two tokenizers: tokens of the same bytes; the others, by rank | |

An objective that is not a divergence on a support is refused when the recipe is read.

## Baselines of the HPD paper

The paper compares HPD with rules that read the label only: no draw, no other token. A teacher that gives one
log-probability a position serves them all ([Where the rules rest](theory.md) says where each of them rests).

| in the paper | method | weight of the label | the same as |
|---|---|---|---|
| SFT | `sft` | 1 | |
| "SeqKD", KD | `label_forward_kl` | p(y) | `hpd` with reverse 0, mask and reinforce off, on `label` |
| RKLD | `label_reverse_kl` | k(y) | `hpd` with forward 0, mask and reinforce off, on `label` |
| JSD | `label_jsd` | (1 - beta) q(y) log(m(y) / q(y)) | `generalized_jsd` at the label |
| HPD | `hpd` | | |
| not in the paper | `masked_sft` | 1[q(y) < p(y)] | |

`seqkd` is Kim and Rush's method, fine-tuning on text that the teacher wrote; it is not the paper's "SeqKD".

## Methods of 2026

What the table holds of this year's papers, what each is tested against, and a recipe that runs it (`hpd train
recipes/NAME.yaml`). The papers' own results were not repeated here; [what was measured](evidence/index.md) is
on made tasks.

| method | source | tested against | recipe |
|---|---|---|---|
| `hpd` | arXiv 2604.20244 | float64, eq. 11-15; the authors' code's numbers | `gsm8k_smollm2` |
| `hpd`, then `opd` | its Table 5 | each stage by itself; resumed bit for bit | `regimes/hpd_then_opd` |
| `acceptance` | 2602.23881 | float64, autograd of -log sum min(p, q) | `method=acceptance` in any |
| `iw_opd` | 2606.22600 | float64, row by row | `positions/iw_opd` |
| a first share | the same | labels masked by hand | `positions/first_share` |
| `length_curriculum` | after the same | shares by hand | `positions/length_curriculum` |
| `tip` | 2604.14084 | float64, sorted entropies | `positions/tip` |
| `sod` | 2605.07725 | float64, step by step | `positions/sod` |
| `opsd` | 2601.18734 | a language with enumerated hints; capped sums | `context/opsd` |
| `sdft` | 2601.19897 | the same; the average in closed form | `context/sdft` |
| `opd`, stored rows | 2604.13010 | ratios: 1 for the writer, exact for another | `stored/offline_on_policy` |

## Sums of terms

```yaml
terms:
  - {objective: nll, weight: 1.0}
  - {objective: akl, weight: 0.1, kwargs: {mu: 0.5}}
```

Each term is logged by itself as `loss/NAME`.

`on: dataset` or `on: student` lets a term learn from one source's text only
([on-policy](guides/on-policy.md)).

## Schedules

`weight` may also be a rule over the tokens of an answer ([weights on positions](concepts/positions.md)).
It, `temperature`, `sample_fraction`, `draw_temperature` and every number in `kwargs` may be a schedule over
training:

```yaml
method: symmetric_kl
method_kwargs: {lam: {schedule: linear, start: 0.0, end: 1.0, over: 0.5}} # constant, linear, cosine, step
```

`taid`'s position is `{schedule: adaptive, start: 0.4, end: 1.0}`: faster while the loss falls; it is saved
and resumed.

## An objective of your own

An `hpd.Objective`, or a function that returns one, from any module that Python can import:

```yaml
terms: [{objective: "my_module:chi_square"}]
```

In Python (`TermConfig`, `distillation_loss`) the objective or its factory itself will do as well.

[Add an objective](guides/extend/objective.md) shows one and how to test it. For an f-divergence two
functions of r = p/q are enough:

```yaml
terms: [{objective: f_divergence, kwargs: {f: "my_module:f", df: "my_module:df"}}]
```

Next: [metrics and log keys](reference/metrics.md)
"""


def page() -> str:
    """The whole text of docs/methods.md."""
    costs = json.loads(COSTS.read_text())["methods"] if COSTS.is_file() else {}
    groups: dict[str, list[str]] = {}
    for name, method in METHODS.items():
        groups.setdefault(_group(method), []).append(_row(name, method, costs))
    tables = []
    for title, rows in sorted(groups.items(), key=lambda item: _ORDER.index(item[0])):
        columns = "| method | needs | support | text, strategy | loss time |"
        tables += [f"**{title}**", "", columns, "|---|---|---|---|---|", *rows, ""]
    note = (
        "**Loss time** is that of the operator (both heads, forward and backward), forward_kl = 1: measured\n"
        "(CPU), [Speed and memory](performance.md). A step also holds the forward passes of both models,\n"
        "which are longer.\n"
        if costs
        else ""
    )
    sections = [_section(name, method) for name, method in METHODS.items()]
    return "\n".join([_HEAD.replace("{loss_time}\n", note), *tables, *sections, _objectives(), _TAIL])


def _group(method: Method) -> str:
    """The group of the table that a method stands in."""
    if method.strategy.type != "direct":
        return _POLICY
    if method.rollouts is not None or method.prefixes.adaptive or method.prefixes.student_share(1.0) > 0:
        return _OWN_TEXT
    return _WHOLE if _needs(method) == _ALL else _ONE_TOKEN


def _needs(method: Method) -> str:
    """What the teacher must give, by the supports of a method's terms."""
    if all(term.objective == "nll" for term in method.terms):
        return "nothing"
    needed: list[str] = []
    for support in (term.support for term in name_terms(method.terms)):
        if support.whole or support.top_k or support.pairs:
            return _ALL
        needed += ["label"] if support.label or support.given else []
        needed += [f"{support.draws_of}'s token"] if support.draws and not support.given else []
    return ", ".join(dict.fromkeys(needed))


def _row(name: str, method: Method, costs: dict[str, float]) -> str:
    supports = ", ".join(str(term.support) for term in name_terms(method.terms))
    prefixes = _prefixes(method)
    cost = f"{costs[name] / costs['forward_kl']:.2f}" if name in costs else ""
    return f"| [`{name}`](#{name}) | {_needs(method)} | {supports} | {prefixes} | {cost} |"


def _prefixes(method: Method) -> str:
    """The student's share in words."""
    first, last = method.prefixes.student_share(0.0), method.prefixes.student_share(1.0)
    if method.prefixes.adaptive:
        share = "student 0, adaptive"
    elif first != last:
        share = f"student {first:g} to {last:g}"
    else:
        share = f"student {first:g}" if first else "dataset"
    extras = [method.strategy.type.replace("_", " ")] if method.strategy.type != "direct" else []
    return ", ".join([share, *extras])


def _section(name: str, method: Method) -> str:
    return (
        f"## {name}\n\n{method.summary[0].upper()}{method.summary[1:]}.\n\n"
        f"* Weight: `{method.weight}`\n* When: {method.use}.\n* Published defaults: {method.defaults}.\n"
        f"* Parameters: {_parameters(method)}\n* Reference: {method.reference}.\n"
    )


def _parameters(method: Method) -> str:
    shown = []
    for term in method.terms:
        for key, parameter in parameters_of(term.objective).items():
            default = term.kwargs.get(key, parameter.default)
            shown.append(f"`{key}` ({default})")
        if isinstance(term.weight, PositionRule):
            shown.append(f"`weight` ({term.weight})")
    return ", ".join(shown) or "none"


def _objectives() -> str:
    lines = ["## Objectives", "", "| objective | parameters | domain | source |", "|---|---|---|---|"]
    for name, factory in OBJECTIVES.items():
        parameters = ", ".join(parameters_of(name))
        doc = inspect.getdoc(factory) or ""
        domain = ""
        if name != "f_divergence":
            domain = TermConfig(objective=name, kwargs=_example(name)).build().objective.domain
        lines.append(f"| `{name}` | {parameters} | {domain} | {doc.splitlines()[0]} |")
    return "\n".join([*lines, "", f"Supports by name: {', '.join(f'`{name}`' for name in SUPPORTS)}."])


def _example(name: str) -> dict[str, float]:
    """Parameters without a default, from the presets."""
    needed = [key for key, p in parameters_of(name).items() if p.default is p.empty]
    return {key: {"lam": 0.1, "alpha": 0.2, "beta": 0.7, "t": 0.5}[key] for key in needed}


def facts() -> str:
    """What `hpd methods` shows without the seconds that torch takes to import."""
    found = {name: _facts_of(method) for name, method in METHODS.items()}
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def _facts_of(method: Method) -> dict[str, Any]:
    terms = [
        {"objective": str(config.objective), "support": str(term.support), "parameters": _meanings(config)}
        for config, term in zip(method.terms, name_terms(method.terms), strict=True)
    ]
    written = {key: getattr(method, key) for key in ("summary", "weight", "use", "defaults", "reference")}
    return {**written, "context": _prefixes(method), "terms": terms}


def _meanings(term: TermConfig) -> list[dict[str, str | None]]:
    """Each parameter of a term's objective, its default here, and what the factory's docstring says of it."""
    found = []
    for name, parameter in parameters_of(term.objective).items():
        default = term.kwargs.get(name, parameter.default)
        shown = None if default is parameter.empty else _shown(default)
        found.append({"name": name, "default": shown, "meaning": _argument(str(term.objective), name)})
    return found


def _shown(value: Any) -> str:
    """A value as an override is written."""
    return json.dumps(value) if isinstance(value, (bool, dict)) or value is None else str(value)


def _argument(objective: str, name: str) -> str:
    """The entry of `Args:` in a factory's docstring, in one line; that of `hpd` where it refers to it."""
    for factory in (OBJECTIVES[objective], OBJECTIVES["hpd"]):
        listed = (inspect.getdoc(factory) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
        entry = re.search(rf"^    {name}: (.*(?:\n {{8}}.*)*)", listed, re.MULTILINE)
        if entry is not None:
            return " ".join(entry[1].split())
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="Exit with 1 where a page differs.")
    check = parser.parse_args().check
    for path, text in ((PAGE, page()), (FACTS, facts())):
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.name} is out of date: run python scripts/make_docs.py")


if __name__ == "__main__":
    main()
