"""A teacher with another tokenizer: every layout, both directions, beside a reference from the texts."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from helpers.trainers import gradient, make_trainer, rows
from helpers.two_tokenizers import DIRECTIONS_AND_LAYOUTS, LAYOUTS, mixed_pairs, slow
from tiny_models import tiny_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpd.config import load_recipe
from hpd.methods.table import method_terms
from hpd.models.token_bytes import token_bytes
from hpd.teachers import CachedTeacher, ModelTeacher
from hpd.training.caching import write_cache
from hpd.training.plan import plan
from hpd.training.run import train


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return mixed_pairs(tmp_path_factory.mktemp("pairs"))


def trainer_of(pair, folder, **options):
    """The teacher's tokenizer is found beside it."""
    return make_trainer(pair, folder, vocabulary="bytes", **options)


def reference(pair, given, name):
    """A label rule and its gradient in float64, row by row, from the texts: chunks by their byte ends."""
    term = method_terms(name, {})[0].build()
    sides, tables, models = [], [], []
    for folder in pair:
        sides.append(AutoTokenizer.from_pretrained(folder))
        tables.append(token_bytes(sides[-1]))
        models.append(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval())
    value, likelihood, count = 0.0, 0.0, 0
    for row in given:
        logs, ends = [], []
        for tokenizer, table, model in zip(sides, tables, models, strict=True):
            before = tokenizer(row["prompt"])["input_ids"]
            ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
            logits = model(input_ids=torch.tensor([ids])).logits[0, len(before) - 1 : -1]
            answer = torch.tensor(ids[len(before) :])
            logs.append(torch.log_softmax(logits, -1).gather(1, answer[:, None])[:, 0])
            sizes = [len(table.texts()[token]) for token in answer[:-1].tolist()] + [1]
            ends.append(list(itertools.accumulate(sizes)))
        count += len(ends[0])
        begin = [0, 0]
        for cut in sorted({*ends[0]} & {*ends[1]}):
            stop = [side.index(cut) + 1 for side in ends]
            n = max(stop[0] - begin[0], stop[1] - begin[1])
            of_q, of_p = (log[a:b].sum() for log, a, b in zip(logs, begin, stop, strict=True))
            columns = of_p.detach()[None, None] / n, of_q.detach()[None, None] / n
            value += n * float(term.objective.value(*columns))
            likelihood = likelihood - term.objective.weights(*columns)[0, 0] * of_q
            begin = stop
    (likelihood / count).backward()
    return value / count, torch.cat([p.grad.flatten() for p in models[0].parameters()])


@pytest.mark.parametrize(("direction", "layout"), DIRECTIONS_AND_LAYOUTS)
def test_loss_and_gradient_are_those_of_a_float64_reference(pairs, tmp_path, layout, direction):
    pair, given = pairs[direction], rows(7)
    loss, grad = gradient(
        trainer_of(pair, tmp_path, method="label_reverse_kl", train=given, **LAYOUTS[layout])
    )
    expected, expected_grad = reference(pair, given, "label_reverse_kl")
    assert loss == pytest.approx(expected, rel=2e-5)
    assert (grad.double() - expected_grad).norm() < 2e-5 * expected_grad.norm()


@pytest.mark.parametrize("method", ["masked_sft", *slow("label_forward_kl", "sft")])
def test_one_tokenizer_on_both_sides_is_training_without_it_bit_for_bit(tmp_path, method):
    pair = tiny_pair("llama", tmp_path / "pair")
    ours, plain = (
        gradient(make_trainer(pair, tmp_path / name, method=method, vocabulary=name))
        for name in ("bytes", "error")
    )
    assert ours[0] == plain[0]
    assert torch.equal(ours[1], plain[1])


def test_the_teacher_reads_its_own_tokens_at_the_right_place(pairs, tmp_path):
    """A change of the teacher at the answer's first token moves its loss there: logits one position late,
    a released default elsewhere, would not see it."""
    pair = pairs[0]
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    seen = {}

    class Watching(ModelTeacher):
        def scores(self, inputs, batch):
            found = super().scores(inputs, batch)
            seen["labels"], seen["ids"] = batch.labels, inputs["input_ids"].flatten()[batch.index + 1]
            seen["inputs"] = inputs["input_ids"]
            if seen.get("change"):
                found.hidden[0] = -found.hidden[0]
            return found

    trainer = make_trainer(pair, tmp_path, teacher=Watching(model), vocabulary="bytes", method="hpd")
    loss, _ = gradient(trainer)
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    assert torch.equal(seen["labels"], seen["ids"])
    assert tokenizer.decode(seen["inputs"][0], skip_special_tokens=True) == "say one: one"
    assert tokenizer.decode(seen["labels"]).startswith(" one<eos>")
    seen["change"] = True
    assert abs(gradient(trainer)[0] - loss) > 1e-4


@pytest.mark.parametrize(
    "method", ["hpd", "alm", *slow("hpd_full", "forward_kl", "reverse_kl", "masked_sft", "uld", "gold")]
)
def test_training_moves_the_student_and_says_how_sure_it_was(pairs, tmp_path, method):
    trainer = trainer_of(
        pairs[0], tmp_path, method=method, evaluation=rows(4), max_steps=6,
        learning_rate=10.0 if method == "alm" else 0.3, eval_strategy="no",
        byte_length="product" if method == "alm" else "geometric",
    )  # fmt: skip
    # The values of hpd and hpd_full are no distances (docs/theory.md).
    watched = {"hpd": "eval_total_weight", "hpd_full": "eval_forward_kl"}.get(method, "eval_loss")
    before = trainer.evaluate()[watched]
    trainer.train()
    logs = trainer.state.log_history[-2]
    assert 0 < logs["one_to_one"] < 1
    assert ("draws_undecided" in logs) == (method == "hpd")
    if method == "hpd":
        assert 0 < logs["draws_undecided"] < 1
    assert trainer.evaluate()[watched] < before


def test_a_cut_row_is_learned_up_to_its_last_whole_chunk(pairs, tmp_path):
    given = [{"prompt": "say one:", "completion": " one two three four five six seven"}]
    trainer = trainer_of(pairs[0], tmp_path, train=given, max_length=11)
    batch = next(iter(trainer.get_train_dataloader()))
    tokenizer = AutoTokenizer.from_pretrained(pairs[0][0])
    learned = tokenizer.decode(batch["label_labels"])
    assert " one two three four five six seven".startswith(learned)
    teacher = AutoTokenizer.from_pretrained(pairs[0][1])
    assert teacher.decode(batch["label_teacher_labels"]) == learned
    assert int(batch["label_dropped"]) + len(batch["label_labels"]) == 11 - len(
        tokenizer("say one:")["input_ids"]
    )
    assert torch.isfinite(torch.tensor(gradient(trainer)[0]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "distillm2"}, r"terms learn from rows of different writers.*Methods that work.*gkd"),
        ({"method": "hpd_expected"}, r"term hpd_expected on label \+ full has no byte form"),
        ({"method": "opd"}, "strategy policy_gradient takes ratios of single tokens"),
        ({"impl": "reference"}, r"train.impl: reference has no form for two tokenizers"),
        ({"truncation_mode": "keep_end"}, "set keep_start"),
        ({"vocabulary": "error", "byte_length": "product"}, "train.byte_length: product has an effect with"),
        ({"method": "alm"}, "compares the probabilities of whole chunks: set train.byte_length: product"),
    ],
)
def test_what_has_no_byte_form_is_refused(pairs, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        make_trainer(pairs[0], tmp_path, **{"vocabulary": "bytes", **options})


def test_pairs_of_tokens_need_two_vocabularies(pairs, tmp_path):
    with pytest.raises(ValueError, match=r"pairs the tokens of two vocabularies: set train.vocabulary"):
        make_trainer((pairs[0][0], pairs[0][0]), tmp_path, method="uld")


def recipe_of(pair, folder, **changes):
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(12)), encoding="utf-8")
    tree = {
        "student": str(pair[0]),
        "teacher": str(pair[1]),
        "data": {"path": str(data), "validation": 0.25},
        "train": {
            "vocabulary": "bytes", "max_steps": 3, "use_cpu": True, "report_to": "none", "logging_steps": 1,
            "per_device_train_batch_size": 2, "eval_strategy": "steps", "eval_steps": 3, "max_length": 64,
        },
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(tree.get(key), dict) else value
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(tree), encoding="utf-8")
    return load_recipe(file)


@pytest.mark.parametrize("direction", [0, *slow(1)])
def test_a_recipe_trains(pairs, tmp_path, direction):
    summary = train(recipe_of(pairs[direction], tmp_path))
    assert summary["steps"] == 3
    assert summary["loss after"] == summary["loss after"]


def test_the_plan_says_how_the_rows_align(pairs, tmp_path):
    found = {v.text for v in plan(recipe_of(pairs[0], tmp_path)).verdicts if v.topic == "two tokenizers"}
    (text,) = found
    assert "are one token of either side, the longest has" in text
    assert "100% of the rows end with both models' end" in text


def test_rows_that_differ_in_bytes_are_counted(pairs, tmp_path):
    recipe = recipe_of(pairs[0], tmp_path)
    data = tmp_path / "rows.jsonl"
    odd = {"prompt": "say:", "completion": " one\u2581two three four"}
    data.write_text(data.read_text(encoding="utf-8") + json.dumps(odd) + "\n", encoding="utf-8")
    warned = [v for v in plan(recipe).verdicts if v.topic == "two tokenizers" and v.level == "warning"]
    assert "bytes of 1 rows" in warned[0].text
    data.write_text("".join(json.dumps(odd) + "\n" for _ in range(8)), encoding="utf-8")
    assert any(v.level == "error" for v in plan(recipe).verdicts)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"teacher": {"type": "server", "url": "http://127.0.0.1:9", "model": "x"}},
            "does not tell the server",
        ),
        ({"method": "minillm"}, "strategy policy_gradient takes ratios of single tokens"),
        ({"method": "gold", "train": {"vocabulary": "error"}}, "pairs the tokens of two vocabularies"),
        ({"method": "alm"}, "set train.byte_length: product"),
        ({"guards": {"support_overlap": {"warn": 0.1}}}, "guards.support_overlap compares token by token"),
        ({"train": {"vocabulary": "byte"}}, "did you mean 'bytes'|bytes"),
    ],
)
def test_a_recipe_is_refused_before_anything_loads(pairs, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        plan(recipe_of(pairs[0], tmp_path, **changes))


@pytest.mark.parametrize("layout", ["padding-free", *slow("padded", "packed")])
def test_a_cache_holds_what_the_teacher_says_in_its_own_tokens(pairs, tmp_path, layout):
    """Cached and live, batch by batch; the cache knows that it is of two tokenizers."""
    settings = {"train": {**LAYOUTS[layout], "shuffle_dataset": False, "eval_strategy": "no"}}
    cache = {"path": str(tmp_path / "cache"), "dtype": "float32"}
    recipe = recipe_of(pairs[0], tmp_path, cache=cache, method="hpd", **settings)
    written = write_cache(recipe)
    planned = plan(recipe)
    live = rows_of_recipe(pairs[0], tmp_path / "live", recipe, ModelTeacher(
        AutoModelForCausalLM.from_pretrained(pairs[0][1])
    ), planned.other.tokenizer)  # fmt: skip
    stored = rows_of_recipe(pairs[0], tmp_path / "stored", recipe, CachedTeacher(cache["path"]), None)
    positions = 0
    for batch in live.get_train_dataloader():
        positions += len(batch["label_teacher_labels"])
        asked = {**batch, "asked": None}
        found, expected = gradient(stored, [dict(batch)]), gradient(live, [asked])
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        assert (found[1] - expected[1]).norm() < 1e-5 * expected[1].norm()
    assert 0 < positions <= written.positions
    plain = {"teacher": {"type": "cached", "path": cache["path"]}}
    with pytest.raises(ValueError, match=r"another .*train.vocabulary \(bytes in the cache, None here\)"):
        plan(recipe_of(pairs[0], tmp_path, **plain, train={"vocabulary": "error"}))


def rows_of_recipe(pair, folder, recipe, teacher, tokenizer):
    given = [dict(row) for row in plan(recipe).rows.train]
    layout = {k: v for k, v in recipe.train.items() if k in ("padding_free", "packing", "max_length")}
    return make_trainer(
        pair, folder, train=given, method="hpd", teacher=teacher, teacher_tokenizer=tokenizer,
        per_device_train_batch_size=recipe.train["per_device_train_batch_size"], vocabulary="bytes",
        shuffle_dataset=False, **layout,
    )  # fmt: skip


def test_a_recipe_trains_from_a_cache(pairs, tmp_path):
    cache = {"path": str(tmp_path / "cache"), "kind": "top_k", "top_k": 4}
    rules = {"method": "masked_sft", "cache": cache}
    write_cache(recipe_of(pairs[0], tmp_path, **rules))
    live = train(recipe_of(pairs[0], tmp_path, method="masked_sft", output_dir=str(tmp_path / "live")))
    cached = {**rules, "teacher": {"type": "cached"}, "output_dir": str(tmp_path / "cached")}
    stored = train(recipe_of(pairs[0], tmp_path, **cached))
    assert stored["loss after"] == pytest.approx(live["loss after"], abs=1e-4)
    with pytest.raises(ValueError, match="tells its likeliest tokens: between two tokenizers it serves"):
        plan(recipe_of(pairs[0], tmp_path, **{**cached, "method": "hpd"}))
