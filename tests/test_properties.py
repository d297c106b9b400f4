"""Properties that hold for whatever input: recipes, collation and supports."""

# ruff: noqa: PT017 (whether it raises is not known before)

from __future__ import annotations

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hpd.batch import IGNORE_INDEX, token_batch
from hpd.config import load_recipe, resolve
from hpd.terms import SUPPORTS, TermConfig

GOOD = {"student": "a", "teacher": "b", "data": {"path": "c"}}
_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
_TREES = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8
)
_KEYS = sorted(resolve(load_recipe(GOOD)))
_INNER = sorted({key for value in resolve(load_recipe(GOOD)).values() if isinstance(value, dict) for key in value})


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from(_KEYS), _TREES | st.dictionaries(st.sampled_from(_INNER), _TREES, max_size=3), max_size=4)
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
    min_size=1, max_size=5,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(rows=_ROWS, padding=st.integers(0, 3))
def test_padded_equals_padding_free_equals_packed(rows, padding):
    """The same labels and the same inputs before them, in every layout; what is padded on is no label."""
    examples = [
        {"input_ids": [t for t, _ in row], "labels": [t if bit else IGNORE_INDEX for t, bit in row]} for row in rows
    ]  # fmt: skip
    padded = DataCollatorForLanguageModeling(pad_token_id=0)(examples)
    wider = {
        name: torch.nn.functional.pad(padded[name], (0, padding), value=IGNORE_INDEX if name == "labels" else 0)
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
    name=st.sampled_from(sorted(SUPPORTS)), draws=st.integers(1, 4), k=st.integers(1, 6), share=st.floats(0.0, 1.0),
    objective=st.sampled_from(["forward_kl", "reverse_kl", "akl", "nll", "hpd"]),
)  # fmt: skip
def test_any_term_is_built_or_refused(name, draws, k, share, objective):
    extra = {"top_k": k} if "top_k" in name else {"num_draws": draws, "draw_share": share} if "sampled" in name else {}
    try:
        term = TermConfig(objective=objective, support=name, **extra).build()
    except ValueError as error:
        assert "." in str(error)
        return
    assert term.support.draws == (draws if "sampled" in name else 1 if name == "rollout" else 0)
    assert yaml.safe_load(yaml.safe_dump(extra)) == extra
