"""Properties that hold for whatever input: recipes, collation and supports."""

# ruff: noqa: PT017 (whether it raises is not known before)

from __future__ import annotations

import inspect

import pytest
import torch
import yaml
from datasets import Dataset
from helpers.problems import assert_equal, compute, problem
from helpers.trainers import make_trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_pair
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hpd.batch import IGNORE_INDEX, token_batch
from hpd.config import load_recipe, resolve
from hpd.methods.supports import Support
from hpd.methods.terms import SUPPORTS, Term, TermConfig
from hpd.objectives import OBJECTIVES

GOOD = {"student": "a", "teacher": "b", "data": {"path": "c"}}
_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
_TREES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_KEYS = sorted(resolve(load_recipe(GOOD)))
_INNER = sorted(
    {key for value in resolve(load_recipe(GOOD)).values() if isinstance(value, dict) for key in value}
)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(_KEYS),
        _TREES | st.dictionaries(st.sampled_from(_INNER), _TREES, max_size=3),
        max_size=4,
    )
)
def test_any_tree_is_a_recipe_or_a_value_error(changes):
    try:
        recipe = load_recipe({**GOOD, **changes})
    except ValueError as error:
        assert str(error)
        assert len(str(error)) < 20_000
        return
    assert load_recipe(resolve(recipe)) == recipe


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_is_an_override_or_a_value_error(text):
    try:
        load_recipe(GOOD, [text])
    except ValueError as error:
        assert str(error)


@settings(max_examples=50, deadline=None)
@given(content=st.binary(max_size=80) | st.text(alphabet="{}[]:-&*!?|>'\"\n a1", max_size=60).map(str.encode))
def test_any_bytes_are_a_recipe_or_a_value_error(content, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="."):
        load_recipe(file)


_ROWS = st.lists(
    st.lists(st.tuples(st.integers(1, 20), st.booleans()), min_size=2, max_size=9).filter(
        lambda row: any(label for _, label in row[1:])
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(rows=_ROWS, padding=st.integers(0, 3))
def test_padded_equals_padding_free_equals_packed(rows, padding):
    """The same labels and the same inputs before them, in every layout; what is padded on is no label."""
    examples = [
        {"input_ids": [t for t, _ in row], "labels": [t if bit else IGNORE_INDEX for t, bit in row]}
        for row in rows
    ]
    padded = DataCollatorForLanguageModeling(pad_token_id=0)(examples)
    wider = {
        name: torch.nn.functional.pad(
            padded[name], (0, padding), value=IGNORE_INDEX if name == "labels" else 0
        )
        for name in ("input_ids", "labels", "attention_mask")
    }
    free = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(examples)
    expected = [t for row in rows for t, bit in row[1:] if bit]
    keys = token_batch(dict(padded), 32).keys.tolist()
    assert len(keys) == len(expected)
    for batch in (padded, wider, free):
        found = token_batch(dict(batch), 32)
        assert found.labels.tolist() == expected
        assert found.keys.tolist() == keys


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(SUPPORTS)),
    draws=st.integers(1, 4),
    k=st.integers(1, 6),
    share=st.floats(0.0, 1.0),
    objective=st.sampled_from(["forward_kl", "reverse_kl", "akl", "nll", "hpd"]),
)
def test_any_term_is_built_or_refused(name, draws, k, share, objective):
    extra = (
        {"top_k": k}
        if "top_k" in name
        else {"num_samples": draws, "sample_fraction": share}
        if "sampled" in name
        else {}
    )
    try:
        term = TermConfig(objective=objective, support=name, **extra).build()
    except ValueError as error:
        assert "." in str(error)
        return
    assert term.support.draws == (draws if "sampled" in name else 1 if name == "rollout" else 0)
    assert yaml.safe_load(yaml.safe_dump(extra)) == extra


def _examples(rows):
    return [
        {"input_ids": [t for t, _ in row], "labels": [t if bit else IGNORE_INDEX for t, bit in row]}
        for row in rows
    ]


def _found(batches):
    """(key, label) of every label position, in no order: packing puts rows where they fit."""
    found = [token_batch(dict(batch), 32) for batch in batches]
    return sorted(
        pair for batch in found for pair in zip(batch.keys.tolist(), batch.labels.tolist(), strict=True)
    )


@settings(max_examples=40, deadline=None)
@given(rows=_ROWS, room=st.integers(0, 12), size=st.integers(1, 3))
def test_packed_rows_have_the_labels_and_keys_of_single_ones(rows, room, size):
    """TRL's packing into rows of any length that holds the longest, collated any number at a time."""
    examples = _examples(rows)
    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    free = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    packed = list(pack_dataset(Dataset.from_list(examples), max(map(len, rows)) + room, "bfd"))
    single = _found(collate([example]) for example in examples)
    assert _found(collate(examples[i : i + size]) for i in range(0, len(examples), size)) == single
    assert _found(free(packed[i : i + size]) for i in range(0, len(packed), size)) == single


@settings(max_examples=40, deadline=None)
@given(rows=_ROWS, max_length=st.integers(2, 9), size=st.integers(1, 3))
def test_packing_that_truncates_keeps_the_prefix_of_a_row(rows, max_length, size):
    """A cut row is a row of its own: labels and draws of its prefix, packed or not."""
    free = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    packed = list(pack_dataset(Dataset.from_list(_examples(rows)), max_length, "bfd"))
    cut = [{name: values[:max_length] for name, values in example.items()} for example in _examples(rows)]
    expected = _found(collate([example]) for example in cut)
    assert _found(free(packed[i : i + size]) for i in range(0, len(packed), size)) == expected
    assert sorted(label for _, label in expected) == sorted(
        t for row in rows for t, bit in row[1:max_length] if bit
    )


@pytest.mark.parametrize("options", [{}, {"packing": True}], ids=["padded", "packed"])
def test_the_trainer_truncates_to_the_prefix_whatever_the_layout(tmp_path_factory, tmp_path, options):
    """The rows of every length from DistillTrainer's own loader against slices made here."""
    folder = tmp_path_factory.getbasetemp() / "truncated-pair"
    pair = (folder / "student", folder / "teacher")
    if not folder.is_dir():
        tiny_pair("llama", folder)
    rows = [{"input_ids": [3 + (7 * i + j) % 90 for j in range(3 + 2 * i)]} for i in range(8)]
    trainer = make_trainer(pair, tmp_path, train=rows, max_length=9, per_device_train_batch_size=4, **options)
    loader = trainer.get_train_dataloader()
    found = sorted(
        pair
        for batch in loader
        for pair in zip(batch["label_keys"].tolist(), batch["label_labels"].tolist(), strict=True)
    )
    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    cut = [{"input_ids": row["input_ids"][:9], "labels": row["input_ids"][:9]} for row in rows]
    expected = [token_batch(dict(collate([row])), 300) for row in cut]
    assert found == sorted(
        pair for batch in expected for pair in zip(batch.keys.tolist(), batch.labels.tolist(), strict=True)
    )


_SIDES, _VOCAB = st.sampled_from(["teacher", "student"]), 11
_SWITCHES = {
    "whole": st.booleans(),
    "label": st.booleans(),
    "draws": st.integers(0, 3),
    "draws_of": _SIDES,
    "importance": st.booleans(),
    "exclude_label": st.booleans(),
    "share": st.floats(0.0, 1.0),
    "temperature": st.floats(0.2, 4.0),
    "top_k": st.integers(0, 14),
    "top_k_of": _SIDES,
    "tail": st.sampled_from(["drop", "bucket", "renormalize"]),
}
# Switches one by one, too, since most combinations of all are refused.
_SUPPORT_FIELDS = st.fixed_dictionaries({}, optional=_SWITCHES) | st.fixed_dictionaries(
    {"label": st.booleans()}, optional={name: _SWITCHES[name] for name in ("top_k", "tail", "top_k_of")}
)
_SUPPORT_FIELDS |= st.fixed_dictionaries(
    {"label": st.just(True), "draws": st.integers(1, 3)},
    optional={
        name: _SWITCHES[name] for name in ("draws_of", "importance", "exclude_label", "share", "temperature")
    },
)
# Those that need no parameters.
_OBJECTIVES = sorted(
    name
    for name, factory in OBJECTIVES.items()
    if all(p.default is not p.empty for p in inspect.signature(factory).parameters.values())
)


@settings(max_examples=300, deadline=None)
@given(
    support=_SUPPORT_FIELDS,
    objective=st.sampled_from(_OBJECTIVES),
    weight=st.floats(0.1, 3.0),
    softened=st.floats(0.3, 3.0),
    rows=st.integers(1, 5),
    sharpness=st.sampled_from([0.1, 1.0, 4.0]),
)
def test_any_support_is_refused_or_its_gradient_is_the_references(
    support, objective, weight, softened, rows, sharpness
):
    try:
        term = Term(objective, OBJECTIVES[objective](), Support(**support), weight, softened).check()
    except ValueError as error:
        assert "." in str(error)
        return
    case = problem(_VOCAB, num_tokens=5, sharpness=sharpness)
    oracle = compute(case, [term], impl="reference")
    assert all(grad is None or bool(grad.isfinite().all()) for grad in oracle.grads)
    assert_equal(compute(case, [term], rows=rows), oracle, rtol=1e-9, atol=1e-11)


def test_many_terms_are_accepted():
    """The properties above would hold if everything were refused."""
    accepted = 0
    for name in SUPPORTS:
        for objective in _OBJECTIVES:
            extra = {"top_k": 3} if "top_k" in name else {}
            try:
                TermConfig(
                    objective=objective, support=name, on="student" if name == "rollout" else "both", **extra
                ).build()
                accepted += 1
            except ValueError:
                continue
    assert accepted > 50
