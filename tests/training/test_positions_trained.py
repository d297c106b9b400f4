"""Rules over positions through the trainer: layouts, splits, processes' share, cuts, columns and steps."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.cached_pairs import make_recipe
from helpers.cached_trainers import trainer_of
from helpers.trainers import first_batch, gradient, make_trainer, rows, weights
from tiny_models import tiny_pair

from hpd import TermConfig
from hpd.batch import TokenBatch
from hpd.config import load_recipe
from hpd.methods.position_rules import PositionRule
from hpd.methods.prefixes import RolloutConfig
from hpd.training.caching import write_cache
from hpd.training.cutting import common_share, cut_batch
from hpd.training.plan import plan

LAYOUTS = {
    "split": {"per_device_train_batch_size": 1},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True},
    "small chunks": {"chunk_bytes": 4096},
}
WEIGHED = [{**row, "merit": 0.5 + i % 3} for i, row in enumerate(rows())]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))


def term(objective="forward_kl", **rule):
    return [TermConfig(objective=objective, weight=PositionRule(**rule))]


RULES = {
    "column": {"rule": "column", "column": "merit"},
    "first": {"rule": "first", "share": 0.5},
    "entropy": {"rule": "entropy", "share": 0.5},
    "drift": {"rule": "drift", "gain": 0.7},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_weights_do_not_depend_on_how_rows_are_laid_out(pair, tmp_path, layout):
    """All four at once, each in a term of its own that no other could stand for."""
    terms = [TermConfig(objective="forward_kl", weight=PositionRule(**rule)) for rule in RULES.values()]
    common = {"method": None, "terms": terms, "train": WEIGHED}
    padded = gradient(make_trainer(pair, tmp_path / "a", **common))
    other = gradient(make_trainer(pair, tmp_path / "b", **common, **layout))
    torch.testing.assert_close(other[0], padded[0], rtol=1e-5, atol=1e-6)
    assert (other[1] - padded[1]).norm() < 1e-5 * padded[1].norm()


@pytest.mark.parametrize("name", ["padded", "padding-free", "packed"])
def test_what_is_cut_off_is_what_weighs_nothing(pair, tmp_path, name):
    """Draws included, over all label tokens; and no token behind the last one needed is read."""
    layout, rule = LAYOUTS.get(name, {}), {"rule": "first", "share": 0.4}
    trainer = make_trainer(pair, tmp_path, method=None, terms=term("hpd", **rule), **layout)
    whole = first_batch(trainer)
    expected = gradient(trainer, [whole])
    cut = cut_batch(whole, common_share(trainer.terms))
    kept, all_of_it = TokenBatch.pop(dict(cut)), TokenBatch.pop(dict(whole))
    count = sum(-(-4 * n // 10) for n in all_of_it.row_lengths.tolist())
    assert len(kept.labels) == count < len(all_of_it.labels)
    assert int(kept.cut) == len(all_of_it.labels) - count
    assert cut["input_ids"].numel() < whole["input_ids"].numel()
    if layout:
        assert int(cut["cu_seq_lens_q"][-1]) == cut["input_ids"].numel()
    trainer.model.zero_grad()
    number = whole["labels"][:, 1:].ne(-100).sum()
    loss = trainer.compute_loss(trainer.model.train(), dict(cut), num_items_in_batch=number)
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    assert float(loss.detach()) == pytest.approx(expected[0], rel=1e-5)
    assert (found - expected[1]).norm() < 1e-5 * expected[1].norm()


def test_training_cuts_and_logs_what_it_would_have_without(pair, tmp_path):
    terms = [
        TermConfig(objective="forward_kl", weight=PositionRule(rule="first", share=0.3)),
        TermConfig(objective="nll", weight=PositionRule(rule="first", share=0.6)),
    ]
    cut, whole = (
        make_trainer(pair, tmp_path / name, method=None, terms=terms, max_steps=3) for name in ("a", "b")
    )
    assert cut._cuts
    whole._cuts = False
    for trainer in (cut, whole):
        trainer.train()
    assert (weights(cut) - weights(whole)).abs().max() < 1e-6
    for one, other in zip(cut.state.log_history[:3], whole.state.log_history[:3], strict=True):
        for name in ("loss", "loss/forward_kl", "loss/nll"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)
        assert one["num_tokens"] < other["num_tokens"]


def test_a_share_that_grows_ends_with_the_whole_answer(pair, tmp_path):
    trainer = make_trainer(
        pair, tmp_path, method="length_curriculum", max_steps=4, optim="sgd", learning_rate=0.0
    )
    plain = make_trainer(pair, tmp_path / "plain", method="forward_kl", max_steps=4, learning_rate=0.0)
    trainer.train()
    plain.train()
    found, expected = ([log["loss"] for log in t.state.log_history[:4]] for t in (trainer, plain))
    assert found[0] < found[1] < found[2]
    assert found[2:] == pytest.approx(expected[2:], rel=1e-6)


def test_evaluation_weighs_as_training_does_and_measures_everything(pair, tmp_path):
    trainer = make_trainer(
        pair, tmp_path, method=None, terms=term(**RULES["first"]), evaluation=rows(5, offset=2)
    )
    metrics = trainer.evaluate()
    plain = make_trainer(pair, tmp_path / "b", method="forward_kl", evaluation=rows(5, offset=2)).evaluate()
    assert metrics["eval_loss"] < plain["eval_loss"]
    assert metrics["eval_forward_kl"] == pytest.approx(plain["eval_forward_kl"], rel=1e-6)


CALL = {"role": "assistant", "content": "one two"}
AGENT = [
    {"role": "user", "content": "say"}, CALL, {"role": "user", "content": "seven"},
    {"role": "assistant", "content": "three four five"}, {"role": "user", "content": "nine"}, CALL,
]  # fmt: skip


def test_steps_are_the_assistants_turns(pair, tmp_path):
    train_rows = [{"messages": AGENT[: 2 * (1 + i % 3)]} for i in range(6)]
    common = {"method": "sod", "train": train_rows, "assistant_only_loss": True, "max_length": 256}
    trainer = make_trainer(pair, tmp_path / "a", **common)
    batch = TokenBatch.pop(first_batch(trainer))
    per_row = [int(batch.steps[batch.rows == row].unique().numel()) for row in range(6)]
    assert per_row == [1, 2, 3, 1, 2, 3]
    free = LAYOUTS["padding-free"]
    padded, other = gradient(trainer), gradient(make_trainer(pair, tmp_path / "b", **common | free))
    assert (other[1] - padded[1]).norm() < 1e-5 * padded[1].norm()
    with pytest.raises(ValueError, match="in every row the labels are one stretch"):
        make_trainer(pair, tmp_path / "c", method="sod")


@pytest.mark.parametrize(
    ("train_rows", "said"),
    [
        (rows(), "'merit', which the dataset does not have: prompt, completion"),
        ([{**row, "merit": "high"} for row in rows()], "Row 0 has merit: 'high'"),
        ([{**row, "merit": float(i) - 1} for i, row in enumerate(rows())], "Row 0 has merit: -1.0"),
        ([{**row, "merit": 0.0} for row in rows()], "Every row weighs 0"),
    ],
    ids=["missing", "text", "negative", "nothing"],
)
def test_a_column_without_weights_is_refused(pair, tmp_path, train_rows, said):
    with pytest.raises(ValueError, match=said):
        make_trainer(pair, tmp_path, method=None, terms=term(**RULES["column"]), train=train_rows)


def test_a_weight_counts_for_the_tokens_of_its_row(pair, tmp_path):
    alone = [{**row, "merit": float(i == 3)} for i, row in enumerate(rows())]
    found = gradient(
        make_trainer(pair, tmp_path / "a", method=None, terms=term(**RULES["column"]), train=alone)
    )
    whole = make_trainer(pair, tmp_path / "b", method="forward_kl")
    one = make_trainer(
        pair, tmp_path / "c", method="forward_kl", train=rows()[3:4], per_device_train_batch_size=1
    )
    counts = [int(t["labels"][:, 1:].ne(-100).sum()) for t in (first_batch(one), first_batch(whole))]
    single = gradient(one)
    assert found[0] == pytest.approx(single[0] * counts[0] / counts[1], rel=1e-5)


@pytest.mark.parametrize("method", ["iw_opd", "tip"])
def test_the_rows_on_the_students_own_text_train(pair, tmp_path, method):
    trainer = make_trainer(
        pair, tmp_path, method=method, rollouts=RolloutConfig(max_new_tokens=6), max_steps=2
    )
    before = weights(trainer)
    trainer.train()
    assert (weights(trainer) - before).abs().max() > 0
    assert torch.isfinite(weights(trainer)).all()


@pytest.mark.slow
def test_a_cached_teacher_weighs_as_the_live_one_and_rows_may_be_cut(tmp_path):
    """The cache was written for whole rows and is asked about beginnings; a top-k one knows the labels."""
    recipe = make_recipe(tmp_path)
    for kind in ("hidden", "top_k"):
        more = ["cache.kind=top_k", "cache.top_k=8"] if kind == "top_k" else []
        write_cache(load_recipe(recipe, [f"cache.path={tmp_path / kind}", *more]))
        for weight in ("{rule: drift}", "{rule: first, share: 0.5}"):
            common = ["method=masked_sft", f"method_kwargs={{weight: {weight}}}"]
            name = f"{kind} {'drift' if 'drift' in weight else 'first'}"
            folders = tmp_path / f"{name} live", tmp_path / f"{name} cached"
            teacher = [f"teacher={{type: cached, path: {tmp_path / kind}}}", "train.packing=true"]
            found = []
            for folder, of_teacher in zip(folders, ([], teacher), strict=True):
                trainer = trainer_of(recipe, folder, *common, *of_teacher, "train.packing=true")
                trainer.train()
                found.append(trainer.state.log_history[0]["loss"])
            assert found[1] == pytest.approx(found[0], rel=1e-3), (kind, weight)


def test_a_recipe_keeps_the_column_and_refuses_one_that_is_not_there(tmp_path):
    recipe = make_recipe(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for i, row in enumerate(lines):
        row["weight"] = i % 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    named = "method_kwargs={weight: {rule: column, column: weight}}"
    trainer = trainer_of(recipe, tmp_path / "run", named)
    batch = TokenBatch.pop(first_batch(trainer))
    assert set(batch.position_weights.tolist()) <= {0.0, 1.0}
    trainer.train()
    with pytest.raises(ValueError, match="weight.column is 'merit', which the dataset does not have"):
        plan(load_recipe(recipe, ["method_kwargs={weight: {rule: column, column: merit}}"]))
