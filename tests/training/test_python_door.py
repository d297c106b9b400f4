"""`DistillTrainer` from Python: what the command line refuses is refused here too, before a model loads."""

import logging

import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers.absolute_model import absolute_positions
from helpers.trainers import make_trainer, rows
from tiny_models import tiny_pair, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from hpd import DistillConfig, DistillTrainer
from hpd.config.models import TeacherConfig
from hpd.methods import METHODS
from hpd.methods.prefixes import Prefixes
from hpd.methods.table import choose_terms
from hpd.teachers import MixtureTeacher, RoutedTeacher, SelfTeacher
from hpd.teachers.remote.server import ServedTeacher
from hpd.training.metrics import evaluated_names
from hpd.training.scheduled import ScheduledTerms

CPU = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "max_steps": 1,
    "max_length": 64,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))


@pytest.fixture
def shuffled(tmp_path):
    """A teacher whose tokenizer gives two ids each other's meaning."""
    _, teacher = tiny_pair("llama", tmp_path)
    file = teacher / "tokenizer.json"
    text = file.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    a, b = (tokenizer.convert_ids_to_tokens(i) for i in (70, 71))
    assert text.count(f'"{a}": 70') == text.count(f'"{b}": 71') == 1
    file.write_text(text.replace(f'"{a}": 70', f'"{a}": 71').replace(f'"{b}": 71', f'"{b}": 70'))
    assert AutoTokenizer.from_pretrained(teacher).convert_ids_to_tokens(70) == b
    return teacher


@pytest.fixture
def nothing_loads(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("hpd.teachers.sources.load_model", refuse)
    monkeypatch.setattr("trl.trainer.sft_trainer.create_model_from_path", refuse)


def build(student, teacher, folder, **options):
    settings = {**CPU, **options.pop("settings", {})}
    options.setdefault("args", DistillConfig(output_dir=str(folder), **settings))
    options.setdefault("train_dataset", Dataset.from_list(rows()))
    return DistillTrainer(student, teacher, method=options.pop("method", "forward_kl"), **options)


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_a_teacher_by_path_with_another_tokenizer_is_refused(pair, shuffled, tmp_path, nothing_loads):
    with pytest.raises(ValueError, match=r"vocabulary: token 70 is .* for the student and .* for the tea"):
        build(str(pair[0]), str(shuffled), tmp_path / "run")


def test_routed_teachers_are_refused_where_the_student_writes(pair, tmp_path, nothing_loads):
    routed = RoutedTeacher({"a": SelfTeacher(), "b": SelfTeacher()}, "who")
    with pytest.raises(ValueError, match="of type routed knows the dataset's rows only.*student writes rows"):
        build(str(pair[0]), routed, tmp_path / "run", prefixes=Prefixes(student=0.5))


def test_a_mixture_of_likeliest_tokens_is_refused(pair, tmp_path, nothing_loads):
    server = TeacherConfig(type="server", url="http://127.0.0.1:9", model="x")
    teachers = {"a": SelfTeacher(), "b": ServedTeacher(server, 300)}
    with pytest.raises(ValueError, match="A mixture needs whole distributions, and teacher 'b' tells some"):
        build(str(pair[0]), MixtureTeacher(teachers, {"a": 1.0, "b": 1.0}), tmp_path / "run")
    teachers["b"].close()


def test_a_loaded_teacher_is_compared_by_its_name(pair, shuffled, tmp_path):
    with pytest.raises(ValueError, match="token 70 is"):
        build(loaded(pair[0]), loaded(shuffled), tmp_path / "run")


@pytest.mark.parametrize("form", ["path", "object"])
def test_a_teachers_tokenizer_may_be_given(pair, shuffled, tmp_path, form, nothing_loads):
    tokenizer = str(shuffled) if form == "path" else AutoTokenizer.from_pretrained(shuffled)
    with pytest.raises(ValueError, match="token 70 is"):
        build(str(pair[0]), str(pair[1]), tmp_path / "run", teacher_tokenizer=tokenizer)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_a_collator_that_pads_on_the_left_keeps_the_positions(tmp_path, left):
    """Positions of GPT-2 are absolute; no padding at all is what is right."""

    def collate(examples):
        width = max(len(example["input_ids"]) for example in examples)
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        batch = {name: [] for name in fill}
        for example in examples:
            values = {**example, "attention_mask": [1] * len(example["input_ids"])}
            for name, filler in fill.items():
                gap = [filler] * (width - len(values[name]))
                batch[name].append([*gap, *values[name]] if left else [*values[name], *gap])
        return {name: torch.tensor(lines) for name, lines in batch.items()}

    ids = [[40 + i] * (3 + 3 * i) + [50, 51, 52] for i in range(4)]
    trainer = build(
        absolute_positions(0),
        absolute_positions(1),
        tmp_path,
        data_collator=collate,
        processing_class=tiny_tokenizer(),
        eval_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in ids]),
    )
    total = count = 0
    with torch.no_grad():
        for row in ids:
            log_q, log_p = (
                model.eval()(torch.tensor([row])).logits[0, :-1].log_softmax(-1)
                for model in (trainer.model, trainer.teacher.model)
            )
            total += float((log_p.exp() * (log_p - log_q)).sum())
            count += len(row) - 1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_what_cannot_be_compared_is_said(pair, tmp_path, caplog):
    teacher = loaded(pair[1])
    teacher.config._name_or_path = teacher.name_or_path = ""
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    with caplog.at_level(logging.WARNING):
        build(loaded(pair[0]), teacher, tmp_path / "a", processing_class=tokenizer)
    assert "the tokenizers of student and teacher were not compared" in caplog.text
    assert "give it as teacher_tokenizer" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        build(
            loaded(pair[0]),
            teacher,
            tmp_path / "b",
            processing_class=tokenizer,
            teacher_tokenizer=AutoTokenizer.from_pretrained(pair[1]),
        )
    assert "not compared" not in caplog.text


def test_equal_tokenizers_train_without_a_word(pair, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="hpd"):
        build(str(pair[0]), str(pair[1]), tmp_path / "run").train()
    assert caplog.text == ""


def test_settings_of_trl_are_accepted(pair, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path / "run"), learning_rate=1e-2, **CPU)
    trainer = build(loaded(pair[0]), loaded(pair[1]), tmp_path, args=args)
    trainer.train()
    assert isinstance(trainer.args, DistillConfig)
    assert trainer.args.learning_rate == 1e-2
    own = build(loaded(pair[0]), loaded(pair[1]), tmp_path / "own", settings={"learning_rate": 1e-2})
    own.train()
    assert trainer.state.log_history[0]["loss"] == own.state.log_history[0]["loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_loss_func": print}, "compute_loss_func has no effect.*objective"),
        (
            {"settings": {"eos_token": "<|nowhere|>"}},
            "eos_token is .*tokenizer does not have",
        ),
        (
            {"train_dataset": Dataset.from_list([{"prompt": "a", "completion": "b", "images": ["x.png"]}])},
            "rows hold images, and the student reads text only",
        ),
    ],
)
def test_what_would_have_no_effect_or_a_wrong_one_is_refused(pair, tmp_path, options, message, nothing_loads):
    with pytest.raises(ValueError, match=message):
        build(str(pair[0]), str(pair[1]), tmp_path / "run", **options)


def test_how_to_load_a_model_that_is_loaded_is_refused(pair, tmp_path):
    with pytest.raises(ValueError, match=r"args.model_init_kwargs has no effect on a model that is loaded"):
        build(loaded(pair[0]), str(pair[1]), tmp_path, settings={"model_init_kwargs": {"dtype": "float32"}})


def by_hand(trainer, data):
    """Mean over label tokens of KL(teacher | student), and the student's accuracy, from whole logits."""
    total = hits = count = 0.0
    for example in trainer._prepare_dataset(data, trainer.processing_class, trainer.args, False, None, "x"):
        inputs, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])
        with torch.no_grad():
            log_q, log_p = (
                model.eval()(inputs).logits[0].double().log_softmax(-1)
                for model in (trainer.model, trainer.teacher.model)
            )
        at = (labels[1:] != -100).nonzero().flatten()
        total += float((log_p.exp() * (log_p - log_q)).sum(-1)[at].sum())
        hits += float((log_q.argmax(-1)[at] == labels[1:][at]).sum())
        count += len(at)
    return total / count, hits / count


def test_predict_returns_the_models_own_logits_and_a_mean_over_tokens(pair, tmp_path):
    trainer = build(loaded(pair[0]), loaded(pair[1]), tmp_path, settings={"per_device_eval_batch_size": 2})
    data = Dataset.from_list(rows(3, offset=2))
    output = trainer.predict(data)
    prepared = trainer._prepare_dataset(data, trainer.processing_class, trainer.args, False, None, "x")
    for example, logits in zip(prepared, output.predictions, strict=True):
        with torch.no_grad():
            own = trainer.model.eval()(torch.tensor([example["input_ids"]])).logits[0]
        torch.testing.assert_close(torch.tensor(logits[: len(own)]), own, rtol=1e-4, atol=1e-4)
    loss, accuracy = by_hand(trainer, data)
    assert output.metrics["test_loss"] == pytest.approx(loss, rel=1e-4)
    assert output.metrics["test_mean_token_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    # Nothing of a prediction is left for the next evaluation.
    assert trainer.sums["eval"].read() == {}


def test_compute_metrics_sees_logits_and_labels(pair, tmp_path):
    seen = []

    def compute_metrics(prediction):
        logits, labels = (torch.tensor(x) for x in (prediction.predictions, prediction.label_ids))
        at = labels[:, 1:] != -100
        seen.append(tuple(logits.shape))
        return {"accuracy": float((logits[:, :-1].argmax(-1) == labels[:, 1:])[at].float().mean())}

    trainer = build(
        loaded(pair[0]),
        loaded(pair[1]),
        tmp_path,
        eval_dataset=Dataset.from_list(rows(4, offset=3)),
        compute_metrics=compute_metrics,
    )
    metrics = trainer.evaluate()
    assert len(seen[0]) == 3
    assert metrics["eval_accuracy"] == pytest.approx(metrics["eval_mean_token_accuracy"], abs=1e-6)


def test_evaluations_log_the_names_of_trl_and_the_loss_of_each_set_is_a_token_mean(pair, tmp_path):
    sets = {"a": Dataset.from_list(rows(3)), "b": Dataset.from_list(rows(5, offset=4))}
    trainer = build(
        loaded(pair[0]),
        loaded(pair[1]),
        tmp_path,
        eval_dataset=sets,
        settings={"per_device_eval_batch_size": 2, "eval_strategy": "steps", "eval_steps": 1},
    )
    trainer.train()
    metrics = trainer.evaluate()
    for name, data in sets.items():
        loss, accuracy = by_hand(trainer, data)
        assert metrics[f"eval_{name}_loss"] == pytest.approx(loss, rel=1e-4)
        assert metrics[f"eval_{name}_mean_token_accuracy"] == pytest.approx(accuracy, abs=1e-6)
        assert metrics[f"eval_{name}_entropy"] == metrics[f"eval_{name}_student_entropy"]
    log = trainer.state.log_history[0]
    assert {"entropy", "mean_token_accuracy", "num_tokens"} <= log.keys()
    assert metrics["eval_b_num_tokens"] == log["num_tokens"] > 0


def stream(data):
    return Dataset.from_list(data).to_iterable_dataset()


@pytest.mark.parametrize("dispatch", [None, True])
def test_a_streamed_evaluation_set_beside_rows_in_memory(pair, tmp_path, dispatch):
    options = {"accelerator_config": {"dispatch_batches": dispatch}, "per_device_eval_batch_size": 2}
    data = rows(5, offset=2)
    trainer = build(
        loaded(pair[0]), loaded(pair[1]), tmp_path / "a", eval_dataset=stream(data), settings=options
    )
    assert isinstance(trainer.eval_dataset, IterableDataset)
    plain = build(
        loaded(pair[0]),
        loaded(pair[1]),
        tmp_path / "b",
        eval_dataset=Dataset.from_list(data),
        settings=options,
    )
    trainer.train()
    plain.train()
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_an_evaluation_before_training_has_trainings_precision(pair, tmp_path):
    def first_and_next(**changes):
        trainer = build(
            loaded(pair[0]),
            loaded(pair[1]),
            tmp_path / str(len(changes)),
            eval_dataset=Dataset.from_list(rows(4, offset=3)),
            settings={"learning_rate": 0.0, **changes},
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        return before, trainer.evaluate()["eval_loss"]

    rounded, exact = first_and_next(bf16=True), first_and_next()
    assert rounded[0] == rounded[1]
    assert exact[0] == exact[1]
    assert rounded[0] != exact[0]


def test_an_unknown_metric_for_the_best_model_is_refused_before_the_first_step(pair, tmp_path):
    trainer = make_trainer(
        pair,
        tmp_path / "a",
        evaluation=rows(2),
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="eval_revers_kl",
    )
    with pytest.raises(ValueError, match=r"which no evaluation has. Did you mean 'reverse_kl'"):
        trainer.train()
    assert trainer.state.global_step == 0
    known = make_trainer(
        pair,
        tmp_path / "b",
        evaluation=rows(2),
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="mean_token_accuracy",
    )
    known.train()
    assert known.state.global_step == 1


@pytest.mark.parametrize("method", sorted({*METHODS} - {"gold", "uld"}))  # those are of two tokenizers
def test_names_of_evaluations_are_known_for_every_method(method):
    terms = ScheduledTerms(choose_terms(method, {}, ())).at(0.0)
    names = evaluated_names(terms, 50, "exact")
    assert {"loss", "reverse_kl", "mean_token_accuracy", "entropy", "runtime"} <= names
    assert all(f"loss/{term.name}" in names for term in terms if len(terms) > 1)


def test_the_known_names_are_those_that_are_logged(pair, tmp_path):
    trainer = make_trainer(pair, tmp_path, method="hpd", evaluation=rows(3))
    logged = {name.removeprefix("eval_") for name in trainer.evaluate()}
    assert logged - trainer.evaluation_names() <= {"model_preparation_time", "epoch"}
