"""Names that changed: the earlier ones are read, say so once, and are never given with the new ones."""

import json
import logging

import pytest
import torch
from helpers.trainers import rows
from tiny_models import tiny_pair
from typer.testing import CliRunner

import hpd
from hpd.cli import app
from hpd.config import load_recipe
from hpd.config.check import resolve
from hpd.experiments.run_files import RunFiles
from hpd.methods import choose_terms, name_terms
from hpd.methods.names import _say, new_keys, new_metrics
from hpd.methods.terms import TermConfig
from hpd.training.run import train

BASE = {"student": "student", "teacher": "teacher", "data": "rows.jsonl", "output_dir": "run"}
OLD = {"objective": "hpd", "num_draws": 4, "draw_share": 0.5}
NEW = {"objective": "hpd", "num_samples": 4, "sample_fraction": 0.5}


@pytest.fixture(autouse=True)
def said_anew():
    _say.cache_clear()


def test_terms_and_methods_mean_the_same_under_both_names():
    assert TermConfig(**OLD) == TermConfig(**NEW)
    old, new = load_recipe({**BASE, "terms": [OLD]}), load_recipe({**BASE, "terms": [NEW]})
    assert old == new
    kwargs = [{"num_draws": 3, "draw_share": 0.25}, {"num_samples": 3, "sample_fraction": 0.25}]
    assert choose_terms("hpd", kwargs[0], ()) == choose_terms("hpd", kwargs[1], ())
    assert choose_terms("hpd_exact", {}, ()) == choose_terms("hpd_expected", {}, ())
    (term,) = name_terms([TermConfig(objective="hpd_exact")])
    assert (term.name, term.objective.rule) == ("hpd_expected", "hpd_expected")
    torch.manual_seed(0)
    logits, labels = (torch.randn(1, 4, 5), torch.randn(1, 4, 5)), torch.tensor([[0, 1, 2, 3]])
    losses = [hpd.distillation_loss(*logits, labels, name).loss for name in ("hpd_exact", "hpd_expected")]
    losses += [
        hpd.distillation_loss(
            *logits, labels, "hpd", generator=torch.Generator().manual_seed(1), **given
        ).loss
        for given in ({"num_draws": 2}, {"num_samples": 2})
    ]
    assert losses[0] == losses[1]
    assert losses[2] == losses[3]


def test_an_earlier_name_is_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            load_recipe({**BASE, "method": "hpd", "method_kwargs": {"draw_share": 0.5}})
    assert [record.message for record in caplog.records] == [
        "draw_share is called sample_fraction now; the earlier name is read until the next release."
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"method": "hpd", "method_kwargs": {"draw_share": 0.5, "sample_fraction": 0.5}},
        {"terms": [{**OLD, "num_samples": 4}]},
    ],
    ids=["method", "term"],
)
def test_both_names_are_an_error(change):
    with pytest.raises(ValueError, match="are one key, which was renamed"):
        load_recipe({**BASE, **change})
    with pytest.raises(ValueError, match="give num_samples alone"):
        TermConfig(objective="hpd", num_draws=1, num_samples=1)


def test_a_recipe_keeps_the_name_that_it_was_given_for_its_method():
    # A grid that began with an earlier version would be another one.
    tree = resolve(load_recipe({**BASE, "method": "hpd", "method_kwargs": {"draw_share": 0.5}}))
    assert tree["method_kwargs"] == {"draw_share": 0.5}


def test_a_run_that_began_under_earlier_names_is_the_same_run(tmp_path):
    pair = tiny_pair("llama", tmp_path / "pair")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(8)))
    tree = {
        **BASE,
        "student": str(pair[0]),
        "teacher": str(pair[1]),
        "data": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "train": {"max_steps": 1, "use_cpu": True, "save_steps": 1, "gradient_checkpointing": False},
    }
    train(load_recipe({**tree, "method": "hpd", "method_kwargs": {"draw_share": 0.5}}))
    tree["train"]["max_steps"] = 2
    summary = train(load_recipe({**tree, "method": "hpd", "method_kwargs": {"sample_fraction": 0.5}}))
    assert summary["steps"] == 2


def test_logs_of_earlier_versions_are_read(tmp_path):
    line = {
        "step": 1,
        "punished": 0.5,
        "eval_mass_moved": 2.0,
        "suppressed": 0.1,
        "drawn_label": 0.2,
        "loss": 1,
    }
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert RunFiles().logs(tmp_path / "metrics.jsonl") == [new_metrics(line)]
    assert new_metrics(line) == {
        "step": 1,
        "sample_penalized": 0.5,
        "eval_total_weight": 2.0,
        "label_penalized": 0.1,
        "sampled_label": 0.2,
        "loss": 1,
    }
    assert new_keys({"a": 1}) == {"a": 1}


def test_hpd_methods_knows_the_earlier_name():
    done = CliRunner().invoke(app, ["methods", "hpd_exact"])
    assert done.exit_code == 0
    assert "hpd_expected:" in done.output
