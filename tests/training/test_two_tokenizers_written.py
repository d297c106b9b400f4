"""Rows that the student writes, for a teacher with another tokenizer."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.trainers import gradient, make_trainer, rows
from helpers.two_tokenizers import DIRECTIONS_AND_LAYOUTS, LAYOUTS, bytes_recipe, mixed_pairs, slow
from tiny_models import tiny_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpd.data.taken_apart import rows_of
from hpd.generation.texts import Rollout
from hpd.methods.prefixes import Prefixes, ReplayConfig, RolloutConfig
from hpd.methods.table import method_terms
from hpd.training.plan import plan
from hpd.training.run import train

WRITES = {"prefixes": Prefixes(student=1.0), "rollouts": RolloutConfig(max_new_tokens=9)}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return mixed_pairs(tmp_path_factory.mktemp("pairs"))


def trainer_of(pair, folder, **options):
    return make_trainer(pair, folder, vocabulary="bytes", **options)


class Dictated:
    """An engine that writes the dataset's answers, as the student's tokenizer makes them."""

    def __init__(self, tokenizer, given):
        self._answers = {}
        for row in given:
            before = tokenizer(row["prompt"])["input_ids"]
            whole = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
            self._answers[tuple(before)] = whole[len(before) :]

    def generate(self, prompts, limits, uniforms, step):
        found = [self._answers[tuple(prompt)] for prompt in prompts]
        return [Rollout(ids, True, [-1.0] * len(ids)) for ids in found]


def written_batches(trainer, engine=None):
    if engine is not None:
        trainer._step.mixer._make_engine = lambda: engine
    return trainer._step.begin(list(trainer.get_train_dataloader()), 0, 0.0)


@pytest.mark.parametrize(("direction", "layout"), DIRECTIONS_AND_LAYOUTS)
def test_a_row_of_the_students_has_the_loss_of_the_same_row_from_a_dataset(
    pairs, tmp_path, direction, layout
):
    pair, given = pairs[direction], rows(7)
    options = {"method": "label_reverse_kl", "train": given, **LAYOUTS[layout]}
    plain = trainer_of(pair, tmp_path / "a", **options)
    writing = trainer_of(pair, tmp_path / "b", **options, **WRITES)
    engine = Dictated(AutoTokenizer.from_pretrained(pair[0]), given)
    expected, ours = list(plain.get_train_dataloader()), written_batches(writing, engine)
    for batch, other in zip(ours, expected, strict=True):
        assert batch["label_by_student"].tolist() == list(range(len(batch["label_labels"])))
        for name in ("labels", "chunks", "teacher_labels", "teacher_chunks", "teacher_keys", "keys"):
            assert torch.equal(batch[f"label_{name}"], other[f"label_{name}"])
    (loss, grad), (same, same_grad) = gradient(writing, ours), gradient(plain, expected)
    assert loss == pytest.approx(same, rel=1e-6)
    assert (grad - same_grad).norm() < 1e-5 * grad.norm()


def test_one_tokenizer_on_both_sides_is_training_without_it_bit_for_bit(tmp_path):
    pair, given = tiny_pair("llama", tmp_path / "pair"), rows(8)
    engine = Dictated(AutoTokenizer.from_pretrained(pair[0]), given)
    found = []
    for name in ("bytes", "error"):
        trainer = make_trainer(
            pair, tmp_path / name, method="masked_sft", vocabulary=name, train=given, **WRITES
        )
        found.append(gradient(trainer, written_batches(trainer, engine)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def reference(pair, written, name):
    """A label rule and its gradient in float64, row by row: what the batch says the two models read."""
    term = method_terms(name, {})[0].build()
    student, teacher = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64).eval() for f in pair)

    def logprobs(model, ids):
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    value, likelihood, count = 0.0, 0.0, 0
    for row in written:
        read = list(row.teacher_prefix) + [token for tokens in row.teacher_chunks for token in tokens]
        of_q, of_p = logprobs(student, row.input_ids), logprobs(teacher, read).detach()
        begin, other = row.begin, len(row.teacher_prefix)
        for place, tokens in enumerate(row.teacher_chunks):
            if not tokens:
                continue
            size, read_size = place + 1 - begin, len(tokens)
            if row.labels[begin] != -100:
                log_q = of_q[begin - 1 : place].sum()
                log_p = of_p[other - 1 : other - 1 + read_size].sum()
                n = max(size, read_size)
                columns = log_p[None, None] / n, log_q.detach()[None, None] / n
                value += n * float(term.objective.value(*columns))
                likelihood = likelihood - term.objective.weights(*columns)[0, 0] * log_q
                count += size
            begin, other = place + 1, other + read_size
    (likelihood / count).backward()
    return value / count, torch.cat([p.grad.flatten() for p in student.parameters()])


@pytest.mark.parametrize("direction", [1, *slow(0)])
def test_what_the_student_really_writes_is_a_float64_reference_s(pairs, tmp_path, direction):
    pair, given = pairs[direction], rows(6)
    trainer = trainer_of(pair, tmp_path, method="label_reverse_kl", train=given, **WRITES)
    (batch,) = written_batches(trainer)
    written = rows_of(batch)
    student, teacher = (AutoTokenizer.from_pretrained(folder) for folder in pair)
    for row, source in zip(written, given, strict=True):
        before = student(source["prompt"])["input_ids"]
        assert row.input_ids[: row.begin] == before
        assert row.teacher_prefix == teacher(source["prompt"])["input_ids"]
        assert len(row.input_ids) <= len(before) + 9
    loss, grad = gradient(trainer, [batch])
    expected, expected_grad = reference(pair, written, "label_reverse_kl")
    assert loss == pytest.approx(expected, rel=2e-5)
    assert (grad.double() - expected_grad).norm() < 2e-5 * expected_grad.norm()


def test_the_teachers_own_prompt_stands_before_what_the_student_writes(pairs, tmp_path):
    pair = pairs[0]
    given = [
        {**row, "teacher_prompt": f"the answer is{row['completion']}. {row['prompt']}"} for row in rows(4)
    ]
    trainer = trainer_of(pair, tmp_path, method="forward_kl", train=given, **WRITES)
    (batch,) = written_batches(trainer)
    teacher = AutoTokenizer.from_pretrained(pair[1])
    for row, source in zip(rows_of(batch), given, strict=True):
        assert row.teacher_prefix == teacher(source["teacher_prompt"])["input_ids"]
    assert math.isfinite(gradient(trainer, [batch])[0])


@pytest.mark.parametrize(
    "options",
    [
        *slow({"method": "gkd", "prefixes": Prefixes(student=0.5)}),
        {"method": "hpd", "prefixes": Prefixes(student=0.5, continue_tokens=3)},
        {
            "method": "alm", "byte_length": "product", "prefixes": Prefixes(student=1.0),
            "rollouts": RolloutConfig(max_new_tokens=6, replay=ReplayConfig(capacity=4, fresh=0.5)),
        },
    ],
)  # fmt: skip
def test_training_on_its_own_rows_says_what_was_not_read(pairs, tmp_path, options):
    trainer = trainer_of(
        pairs[0], tmp_path, max_steps=3, train=rows(12), **{"rollouts": WRITES["rollouts"], **options}
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "rollouts/unread" in log]
    assert logs
    assert all(0 <= log["rollouts/unread"] <= 1 for log in logs)
    assert all(math.isfinite(log["loss"]) for log in logs)


def test_a_batch_of_which_nothing_is_learned_has_no_loss(pairs, tmp_path):
    class Mute:
        def generate(self, prompts, limits, uniforms, step):
            return [Rollout([beyond], False, [-1.0]) for _ in prompts]

    beyond = len(AutoTokenizer.from_pretrained(pairs[0][0])) - 1
    trainer = trainer_of(pairs[0], tmp_path, method="hpd", train=rows(4), **WRITES)
    batches = written_batches(trainer, Mute())
    loss, grad = gradient(trainer, batches)
    assert loss == 0
    assert not grad.any()
    assert trainer._step.mixer.read()["unread"] == 4


def recipe_of(pair, folder, given, **changes):
    tree = {"method": "reverse_kl", "prefixes": {"student": 1}, "rollouts": {"max_new_tokens": 5}, **changes}
    return bytes_recipe(pair, folder, given, **tree)


def test_prompts_alone_are_enough_and_chats_end_with_their_turn(pairs, tmp_path):
    given = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows(6)]
    recipe = recipe_of(pairs[0], tmp_path, given)
    verdicts = plan(recipe).verdicts
    assert not [v for v in verdicts if v.level == "error"]
    assert train(recipe)["steps"] == 2
    from datasets import load_dataset

    trainer = trainer_of(
        pairs[0], tmp_path / "again", method="reverse_kl",
        train=list(load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train")), **WRITES,
    )  # fmt: skip
    teacher = AutoTokenizer.from_pretrained(pairs[0][1])
    assert trainer.answer_reader()._end == teacher.convert_tokens_to_ids("<end_of_turn>")


def test_answers_that_would_begin_elsewhere_for_the_teacher_are_refused(pairs, tmp_path):
    given = [{"prompt": "say ", "completion": "one two"}] * 4
    with pytest.raises(ValueError, match="Row 0: tokens merge where prompt and answer meet"):
        plan(recipe_of(pairs[0], tmp_path, given))


def test_what_the_student_may_write_counts_towards_the_teachers_context(pairs, tmp_path):
    given = rows(6)
    recipe = recipe_of(
        pairs[0], tmp_path, given, rollouts={"max_new_tokens": 2000}, train={"max_length": None}
    )
    found = [v.text for v in plan(recipe).verdicts if v.topic == "context" and "teacher" in v.text]
    assert any("its context has 512" in text for text in found)
