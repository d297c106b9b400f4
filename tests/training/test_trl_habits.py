"""TRL's own tests of SFTTrainer, with `DistillTrainer` in its place: method sft, the teacher a copy.

Each situation is given to both trainers in one process, and what `DistillTrainer` does is compared with what
TRL's trainer does, number by number. A test below compares the table of docs/compatibility.md with this one.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trl_inputs import TEMPLATES, rows_of, save_family
from helpers.trl_situations import (
    DIFFERENT,
    ELSEWHERE,
    PREPARED,
    REFUSED,
    REFUSED_BY_BOTH,
    TRAINED,
    Situation,
    folder_of,
)
from trl import SFTConfig, SFTTrainer

from hpd import DistillTrainer
from hpd.training.arguments import as_config

QUICK = {
    "test_train[tiny-Qwen2ForCausalLM-2.5]",
    "test_train_dataset_format[conversational_prompt_completion]",
    "test_train_with_chat_template_kwargs",
    "test_eval_packing",
    "test_fully_masked_examples_dropped_after_truncation",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_family("qwen2", folder / "qwen2")
    (folder / "template.jinja").write_text(TEMPLATES["role_capital"], encoding="utf-8")
    return folder


def build(kind: type, situation: Situation, root: Path, output: Path) -> Any:
    """A trainer of the situation's inputs; ours with the student's copy as its teacher."""
    folder = folder_of(situation, root)
    settings = {
        "output_dir": str(output),
        "report_to": "none",
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        **situation.settings,
    }
    if path := settings.get("chat_template_path"):
        settings["chat_template_path"] = path.replace("FOLDER", str(root))
    args: Any = SFTConfig(**settings)
    rows = situation.rows
    options = {
        "model": str(folder),
        "train_dataset": rows_of(rows) if isinstance(rows, str) else rows(folder),
        **situation.options(folder),
    }
    if kind is DistillTrainer:
        args = as_config(args)
        args.metric_stride = 1
        options = {"teacher": str(folder), "method": "sft", **options}
    else:
        options.pop("teacher", None)
    return kind(args=args, **options)


def trained(
    kind: type, situation: Situation, root: Path, output: Path
) -> tuple[Any, list[dict[str, Any]], set[str]]:
    """A trainer that has trained, what it logged, and the names of the weights that moved."""
    trainer = build(kind, situation, root, output)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    moved = {
        name for name, weight in trainer.model.named_parameters() if not torch.equal(before[name], weight)
    }
    history = copy.deepcopy(trainer.state.log_history)
    if situation.evaluates is not None:
        history.append(trainer.evaluate(situation.evaluates()))
    return trainer, history, moved


TIMES = ("runtime", "per_second", "total_flos", "preparation_time")


def differences(theirs: list[dict[str, Any]], ours: list[dict[str, Any]], tolerance: float) -> list[str]:
    """What TRL logs and `DistillTrainer` does not, or otherwise."""
    found = [] if len(theirs) == len(ours) else [f"{len(theirs)} logs, {len(ours)} of ours"]
    for log, mine in zip(theirs, ours, strict=False):
        for name, value in log.items():
            if any(time in name for time in TIMES):
                continue
            name = _of_its_set(name, log)
            if name not in mine:
                found.append(f"step {log.get('step')}: no {name}")
            elif value != pytest.approx(mine[name], rel=tolerance, abs=tolerance):
                found.append(f"step {log.get('step')}: {name} {value} for theirs, {mine[name]} for ours")
    return found


def _of_its_set(name: str, log: dict[str, Any]) -> str:
    """Of several evaluation sets TRL logs `eval_entropy` in turn, and `DistillTrainer` by the set's name."""
    sets = [key.removesuffix("_loss") for key in log if key.startswith("eval_data") and key.endswith("_loss")]
    return name.replace("eval", sets[-1], 1) if sets and not name.startswith("eval_data") else name


def _slow(table: dict[str, Any]) -> list[Any]:
    # Of long values pytest makes ids of its own.
    return [pytest.param(name, id=name, marks=() if name in QUICK else pytest.mark.slow) for name in table]


@pytest.mark.parametrize("name", _slow(TRAINED))
@pytest.mark.filterwarnings("ignore")
def test_trained_alike(name, root, tmp_path):
    situation = TRAINED[name]
    (theirs, log, moved), (ours, own_log, own_moved) = (
        trained(kind, situation, root, tmp_path / kind.__name__) for kind in (SFTTrainer, DistillTrainer)
    )
    assert not differences(log, own_log, 2e-2 if situation.settings.get("bf16") else 2e-6)
    assert moved == own_moved
    assert moved
    assert ours.processing_class.chat_template == theirs.processing_class.chat_template
    for file in sorted((tmp_path / "SFTTrainer").glob("checkpoint-*/chat_template.jinja")):
        own = tmp_path / "DistillTrainer" / file.parent.name / file.name
        assert own.read_text(encoding="utf-8") == file.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in DIFFERENT if "prompt_tuning" in name])
@pytest.mark.filterwarnings("ignore")
def test_virtual_tokens_predict_no_token(name, root, tmp_path):
    alike = {}
    for rows in ("standard_language_modeling", "standard_prompt_completion"):
        situation = DIFFERENT[name][0]._replace(rows=rows)
        (_, log, moved), (_, own_log, own_moved) = (
            trained(kind, situation, root, tmp_path / rows / kind.__name__)
            for kind in (SFTTrainer, DistillTrainer)
        )
        alike[rows] = not differences(log, own_log, 2e-6)
        assert moved == own_moved
    assert alike == {"standard_language_modeling": False, "standard_prompt_completion": True}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_first_step_in_float16(root, tmp_path):
    (_, log, moved), (_, own_log, own_moved) = (
        trained(kind, DIFFERENT["test_train_model_dtype"][0], root, tmp_path / kind.__name__)
        for kind in (SFTTrainer, DistillTrainer)
    )
    assert not differences(log[:1], own_log[:1], 2e-6)
    assert own_log[1]["loss"] == pytest.approx(log[1]["loss"], abs=1e-3)
    assert moved == own_moved


@pytest.mark.parametrize("name", ["test_tag_added", "test_tag_added_peft"])
@pytest.mark.filterwarnings("ignore")
def test_tags_are_our_own(name, root, tmp_path):
    tags = build(DistillTrainer, DIFFERENT[name][0], root, tmp_path).model.model_tags
    assert {"hpd", "distillation"} <= set(tags)


@pytest.mark.parametrize("name", _slow(PREPARED))
@pytest.mark.filterwarnings("ignore")
def test_prepared_alike(name, root, tmp_path):
    theirs, ours = (build(kind, PREPARED[name], root, tmp_path) for kind in (SFTTrainer, DistillTrainer))
    assert _columns(theirs.train_dataset) == _columns(ours.train_dataset)
    assert _columns(theirs.eval_dataset) == _columns(ours.eval_dataset)


def _columns(rows: Any) -> Any:
    """What a trainer reads of rows, of sets of rows by their name, or of nothing."""
    if isinstance(rows, dict):
        return {name: _columns(part) for name, part in rows.items()}
    kept = ("input_ids", "labels", "seq_lengths")
    return None if rows is None else [{key: row[key] for key in kept if key in row} for row in rows]


@pytest.mark.parametrize("name", REFUSED_BY_BOTH)
@pytest.mark.filterwarnings("ignore")
def test_refused_by_both(name, root, tmp_path):
    situation, message = REFUSED_BY_BOTH[name]
    for kind in (SFTTrainer, DistillTrainer):
        with pytest.raises(ValueError, match=message):
            build(kind, situation, root, tmp_path)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_refused_for_a_stated_reason(name, root, tmp_path):
    situation, message, _ = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        build(DistillTrainer, situation, root, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_code_beside_the_weights_is_not_run_unasked(root, tmp_path):
    situation = TRAINED["test_trust_remote_code"]._replace(settings={})
    for kind in (SFTTrainer, DistillTrainer):
        with pytest.raises(ValueError, match="custom code|trust_remote_code"):
            build(kind, situation, root, tmp_path)


def table() -> dict[tuple[str, str], int]:
    """How many of TRL's tests there are by name and by what becomes of them."""
    verdicts = {
        **dict.fromkeys(TRAINED, "passes"),
        **dict.fromkeys(PREPARED, "passes"),
        **dict.fromkeys(REFUSED_BY_BOTH, "passes: refused, as by TRL"),
        **{name: reason for name, (_, reason) in DIFFERENT.items()},
        **{name: reason for name, (*_, reason) in REFUSED.items()},
    }
    counts: dict[tuple[str, str], int] = {}
    for name, verdict in verdicts.items():
        key = (name.partition("[")[0], verdict)
        counts[key] = counts.get(key, 0) + 1
    for name, (count, reason) in ELSEWHERE.items():
        counts[name, reason] = count
    return counts


def test_the_page_has_the_table():
    text = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
    counts = table()
    for (name, verdict), count in counts.items():
        assert f"| `{name}` | {count} | {verdict} |" in text
    passed, differing, refused = (
        sum(
            count
            for (_, verdict), count in counts.items()
            if verdict.startswith(start) and "liger" not in verdict
        )
        for start in ("passes", "differs", "refused")
    )
    total = sum(counts.values())
    assert f"{total} tests, {passed + differing + refused} of them valid" in text
    assert f"{passed} pass, {differing} differ and {refused} are" in text
