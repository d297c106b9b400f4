"""Distribution metrics against naive computations, and against a model whose texts can be enumerated."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import NUM_TOKENS, tiny_model, tiny_pair
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hpd.cli import app
from hpd.evaluate.distribution import (
    METRICS,
    _cut,
    check_metrics,
    distribution_metrics,
)
from hpd.evaluate.statistics import estimate, ratio
from hpd.evaluate.text_rows import TextRow, read_text_rows
from hpd.evaluate.token_statistics import TextTokens, distinct_ngrams, longest_loop, repeated_ngrams, sum_rows
from hpd.generation.settings import GenerationSettings
from hpd.models.forward import add_head_function

ROWS = [
    TextRow("say one", "one two three four"),
    TextRow("say two", "two three"),
    TextRow("what is the sum of the two numbers?", "the answer is four."),
    TextRow("say five", "five six seven eight nine ten nine eight"),
    TextRow("hi", "a"),
]
SETTINGS = GenerationSettings(temperature=1.0, max_new_tokens=12, batch_size=2)


@pytest.fixture(scope="module", params=["qwen2", "gemma3_text"])
def pair(request, tmp_path_factory):
    folders = tiny_pair(request.param, tmp_path_factory.mktemp(request.param))
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]
    return *models, AutoTokenizer.from_pretrained(folders[0])


def _naive(student, teacher, ids: list[int], is_label: list[bool]) -> dict[str, torch.Tensor]:
    """Per label position, from the models' own logits, one row at a time and in float64."""
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0, :-1].double() for model in (student, teacher)]
    keep = torch.tensor(is_label[1:])
    labels = torch.tensor(ids[1:])[keep]
    q, p = (torch.softmax(side[keep], -1) for side in logits)
    top = [side.topk(10).indices for side in (q, p)]
    return {
        "forward_kl": torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(-1),
        "reverse_kl": torch.nn.functional.kl_div(p.log(), q, reduction="none").sum(-1),
        "student_entropy": torch.distributions.Categorical(q).entropy(),
        "teacher_entropy": torch.distributions.Categorical(p).entropy(),
        "student_nll": torch.nn.functional.cross_entropy(logits[0][keep], labels, reduction="none"),
        "teacher_nll": torch.nn.functional.cross_entropy(logits[1][keep], labels, reduction="none"),
        "overlap": torch.tensor(
            [len(set(a.tolist()) & set(b.tolist())) / 10 for a, b in zip(*top, strict=True)]
        ).double(),
        "confidence": q.max(-1).values,
        "hit": (q.argmax(-1) == labels).double(),
    }


def _texts(tokenizer) -> list[TextTokens]:
    texts = []
    for prompt, completion in ROWS:
        head = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(head + completion, add_special_tokens=False)["input_ids"]
        start = len(tokenizer(head, add_special_tokens=False)["input_ids"])
        texts.append(TextTokens(ids, [place >= start for place in range(len(ids))]))
    return texts


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_row_sums_equal_the_naive_ones(pair, batch_size: int, monkeypatch) -> None:
    monkeypatch.setattr(
        "hpd.evaluate.token_statistics._CHUNK_BYTES", 4 * NUM_TOKENS * 3
    )  # three positions at a time
    student, teacher, tokenizer = pair
    for model in (student, teacher):
        add_head_function(model)
    texts = _texts(tokenizer)
    sums = sum_rows(student, teacher, texts, vocab=NUM_TOKENS, top_k=10, batch_size=batch_size, pad_id=0)
    for row, text in enumerate(texts):
        naive = _naive(student, teacher, *text)
        assert sums.tokens[row] == len(naive["hit"]) > 0
        for name in sums.values.keys() & naive.keys():
            assert sums.values[name][row] == pytest.approx(float(naive[name].sum()), abs=2e-4), name
        bins = sums.bins["student"][row]
        assert bins.sum(0) == pytest.approx(
            [float(x.sum()) for x in (naive["hit"] * 0 + 1, naive["confidence"], naive["hit"])], abs=1e-4
        )
        place = (naive["confidence"] * 15).long().clamp(max=14)
        assert bins[:, 0].tolist() == torch.bincount(place, minlength=15).tolist()
    assert {"forward_kl", "reverse_kl", "student_nll", "overlap"} <= sums.values.keys()


def test_metrics_are_token_means_with_intervals_around_them(pair) -> None:
    student, teacher, tokenizer = pair
    report = distribution_metrics(student, teacher, tokenizer, ROWS, settings=SETTINGS)
    json.dumps(report)
    data = report["dataset"]
    assert data["tokens"] > report["num_rows"] == 5
    for text in ("dataset", "student"):
        for name in (
            "forward_kl",
            "reverse_kl",
            "student_entropy",
            "overlap",
            "student_perplexity",
            "longest_loop_tokens",
        ):
            low, high = report[text][name]["interval"]
            assert low <= report[text][name]["value"] <= high, name
    gap = report["gap"]["student_entropy"]["value"]
    assert gap == pytest.approx(
        report["student"]["student_entropy"]["value"] - data["student_entropy"]["value"]
    )
    assert report["student"]["tokens_per_text"]["value"] <= SETTINGS.max_new_tokens
    assert "student_ece" in data
    assert "student_ece" not in report["student"]


def test_a_student_that_is_its_teacher(pair) -> None:
    student, _, tokenizer = pair
    report = distribution_metrics(
        student, student, tokenizer, ROWS, ("kl", "overlap", "perplexity"), SETTINGS
    )
    for text in ("dataset", "student"):
        figures = report[text]
        assert figures["forward_kl"]["value"] == pytest.approx(0, abs=1e-6)
        assert figures["reverse_kl"]["value"] == pytest.approx(0, abs=1e-6)
        assert figures["overlap"]["value"] == figures["top1_agreement"]["value"] == 1.0
        assert figures["student_perplexity"] == figures["teacher_perplexity"]


def test_training_reports_the_same_divergence(tmp_path: Path) -> None:
    """`hpd eval --metrics kl` on the validation rows gives what the trainer logs for them."""
    from hpd.config import load_recipe
    from hpd.training.run import train

    student, teacher = tiny_pair("qwen2", tmp_path)
    rows = [
        {"prompt": [{"role": "user", "content": p}], "completion": [{"role": "assistant", "content": c}]}
        for p, c in ROWS
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "student": {"model": str(student)},
                "teacher": {"model": str(teacher)},
                "data": {"path": str(data), "validation": str(data)},
                "method": "forward_kl",
                "output_dir": str(tmp_path / "run"),
                "train": {
                    "max_steps": 1,
                    "learning_rate": 0.0,
                    "per_device_train_batch_size": 2,
                    "use_cpu": True,
                },
            }
        )
    )
    logged = train(load_recipe(recipe))
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (student, teacher)]
    tokenizer = AutoTokenizer.from_pretrained(student)
    report = distribution_metrics(
        *models, tokenizer, read_text_rows(data), ("kl", "entropy"), SETTINGS, texts=("dataset",)
    )
    for name in ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy"):
        assert report["dataset"][name]["value"] == pytest.approx(logged[f"{name} before"], rel=1e-4), name


class _Alphabet:
    """Three tokens, the last ends a text."""

    chat_template = None
    eos_token_id = pad_token_id = 2
    eos_token = ""

    def __call__(self, text: str, **_) -> dict[str, list[int]]:
        return {"input_ids": [int(letter) for letter in text]}

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(str, tokens))


def test_reverse_kl_on_student_texts_estimates_the_sequence_level_one() -> None:
    """All texts of a three-token model, their probabilities multiplied out, against sampled ones."""
    config = LlamaConfig(
        vocab_size=3,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.6,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=2,
    )
    models = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            models.append(LlamaForCausalLM(config).eval())
    length, prompt = 3, [0, 1]
    exact_kl = exact_tokens = 0.0
    for text in itertools.product(range(3), repeat=length):
        end = text.index(2) + 1 if 2 in text else length
        if any(token != 2 for token in text[end:]):
            continue  # each text once: what follows its end is fixed
        ids = torch.tensor([prompt + list(text[:end])])
        with torch.no_grad():
            logq, logp = (torch.log_softmax(model(ids).logits[0, 1:-1].double(), -1) for model in models)
        chosen = ids[0, 2:, None]
        q = logq.gather(1, chosen).sum().exp()
        exact_kl += float(q * (logq.gather(1, chosen).sum() - logp.gather(1, chosen).sum()))
        exact_tokens += float(q * end)
    rows = [TextRow("01", "0")] * 400
    settings = GenerationSettings(temperature=1.0, max_new_tokens=length, batch_size=100)
    report = distribution_metrics(*models, _Alphabet(), rows, ("kl", "length"), settings, texts=("student",))
    figures = report["student"]
    low, high = figures["reverse_kl"]["interval"]
    margin = (high - low) / 2
    assert margin < 0.2 * exact_kl / exact_tokens
    assert abs(figures["reverse_kl"]["value"] - exact_kl / exact_tokens) < 2 * margin
    assert figures["tokens_per_text"]["value"] == pytest.approx(exact_tokens, abs=0.15)


def test_unequal_heads(tmp_path: Path) -> None:
    student, teacher = tiny_pair("qwen2", tmp_path, teacher_vocab=NUM_TOKENS + 20)
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (student, teacher)]
    tokenizer = AutoTokenizer.from_pretrained(student)
    with pytest.raises(ValueError, match="shared_prefix"):
        distribution_metrics(*models, tokenizer, ROWS, ("kl",), SETTINGS)
    report = distribution_metrics(
        *models,
        tokenizer,
        ROWS,
        ("kl",),
        SETTINGS,
        vocabulary="shared_prefix",
        texts=("dataset",),
        teacher_tokenizer=tokenizer,
    )
    assert report["common_vocabulary"] == NUM_TOKENS
    assert 0 < report["dataset"]["teacher_mass_outside"]["value"] < 1
    assert "student_mass_outside" not in report["dataset"]
    text = _texts(tokenizer)[0]
    sums = sum_rows(*models, [text], vocab=NUM_TOKENS, top_k=10, batch_size=1, pad_id=0)
    keep = torch.tensor(text.is_label[1:])
    with torch.no_grad():
        logits = [model(torch.tensor([text.ids])).logits[0, :-1].double()[keep] for model in models]
    q, p = (torch.softmax(side[:, :NUM_TOKENS], -1) for side in logits)
    assert sums.values["forward_kl"][0] == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-4)
    outside = torch.softmax(logits[1], -1)[:, NUM_TOKENS:].sum()
    assert sums.values["teacher_mass_outside"][0] == pytest.approx(float(outside), abs=1e-5)


def test_a_token_that_one_model_lacks_ends_the_text() -> None:
    texts = [
        TextTokens([1, 2, 3, 9, 4], [False, True, True, True, True]),
        TextTokens([1, 2, 3], [False, False, True]),
    ]
    cut, lost = _cut(texts, None, vocab=5)
    assert cut == [TextTokens([1, 2, 3], [False, True, True]), texts[1]]
    assert lost == {"rows_cut": 1, "labels_dropped": 2}
    with pytest.raises(ValueError, match="no completion token that both models can read"):
        _cut([TextTokens([1, 9], [False, True])], None, vocab=5)


def test_different_tokenizers_are_refused(pair, tmp_path: Path) -> None:
    student, teacher, tokenizer = pair
    other = AutoTokenizer.from_pretrained(tiny_model("llama", tmp_path / "other"))
    vocabulary = json.loads(other.backend_tokenizer.to_str())
    names = vocabulary["model"]["vocab"]
    names["a"], names["b"] = names["b"], names["a"]
    from tokenizers import Tokenizer

    other._tokenizer = Tokenizer.from_str(json.dumps(vocabulary))
    with pytest.raises(ValueError, match="the tokenizers are different"):
        distribution_metrics(student, teacher, tokenizer, ROWS, ("kl",), SETTINGS, teacher_tokenizer=other)


def test_without_a_teacher(pair) -> None:
    student, _, tokenizer = pair
    report = distribution_metrics(
        student, None, tokenizer, ROWS, ("entropy", "perplexity", "length"), SETTINGS
    )
    assert set(report["dataset"]) == {
        "tokens",
        "labels_dropped",
        "rows_cut",
        "student_entropy",
        "student_perplexity",
        "tokens_per_text",
    }


@pytest.mark.parametrize(
    ("metrics", "texts", "teacher", "message"),
    [
        (["kl"], ["dataset"], False, "give one with --teacher"),
        (["bleu"], ["dataset"], True, "metrics are kl, .*got bleu"),
        ([], ["dataset"], True, "got none"),
        (["entropy"], ["teacher"], True, "texts are dataset, student; got teacher"),
        (["calibration"], ["student"], True, "add dataset"),
    ],
)
def test_what_cannot_be_measured_is_refused_early(metrics, texts, teacher: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_metrics(metrics, texts, teacher)
    check_metrics(list(METRICS), ["dataset", "student"], True)


def test_rows_beyond_the_length_limit(pair) -> None:
    student, teacher, tokenizer = pair
    rows = [TextRow("hi", "one two three four five six seven"), TextRow("say two " * 9, "two")]
    whole, cut = (
        distribution_metrics(
            student, teacher, tokenizer, rows[:1], ("kl",), SETTINGS, texts=("dataset",), max_length=length
        )
        for length in (None, 20)
    )
    assert (whole["dataset"]["rows_cut"], cut["dataset"]["rows_cut"]) == (0, 1)
    lost = whole["dataset"]["tokens"] - cut["dataset"]["tokens"]
    assert cut["dataset"]["labels_dropped"] == lost > 0
    with pytest.raises(ValueError, match=r"1 of 2 rows \(the first is row 2\)"):
        distribution_metrics(
            student, teacher, tokenizer, rows, ("kl",), SETTINGS, texts=("dataset",), max_length=20
        )


# --- rows and text statistics ---------------------------------------------------------------------


def _write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_of_every_form(tmp_path: Path) -> None:
    turn = {"role": "user", "content": "q"}
    assistant = {"role": "assistant", "content": "a"}
    forms = {
        "gsm": ({"question": "q", "answer": "a"}, "q"),
        "chat": ({"prompt": [turn], "completion": [assistant]}, [turn]),
        "messages": ({"messages": [turn, assistant]}, [turn]),
        "alpaca": ({"instruction": "q", "output": "a"}, "q"),
    }
    for name, (row, prompt) in forms.items():
        assert read_text_rows(_write(tmp_path / f"{name}.jsonl", [row, row]), limit=1) == [
            TextRow(prompt, "a")
        ], name
    with pytest.raises(ValueError, match="no completion column.*it has question"):
        read_text_rows(_write(tmp_path / "a.jsonl", [{"question": "q"}]))
    with pytest.raises(ValueError, match="row 2 has no text"):
        read_text_rows(
            _write(tmp_path / "b.jsonl", [{"prompt": "q", "answer": "a"}, {"prompt": "q", "answer": " "}])
        )
    with pytest.raises(ValueError, match="row 1 do not end with an assistant"):
        read_text_rows(_write(tmp_path / "c.jsonl", [{"messages": [turn]}]))


def _brute_force_loop(tokens: list[int]) -> int:
    best = 0
    for start, end in itertools.combinations(range(len(tokens) + 1), 2):
        part = tokens[start:end]
        for period in range(1, len(part) // 3 + 1):
            if all(part[i] == part[i - period] for i in range(period, len(part))):
                best = max(best, len(part))
    return best


def test_longest_loop_equals_brute_force() -> None:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(60):
        tokens = generator.integers(2, size=generator.integers(0, 14)).tolist()
        found.append(longest_loop(tokens))
        assert found[-1] == _brute_force_loop(tokens), tokens
    assert len(set(found)) > 4


def test_repetition_figures() -> None:
    assert repeated_ngrams([1, 1, 1, 1], 1) == 0.75
    assert repeated_ngrams([1, 2], 3) == 0.0
    assert distinct_ngrams([[1, 2], [1, 2]], 1) == 0.5
    assert distinct_ngrams([[1]], 2) is None


def test_bootstrap_covers_the_mean() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        values = generator.normal(3.0, 1.0, size=60)
        found = estimate(ratio(values, np.ones(60)), 60, seed)
        assert found.value == pytest.approx(values.mean())
        covered += found.low <= 3.0 <= found.high
    assert 0.88 < covered / 200 < 0.99


# --- the command line -----------------------------------------------------------------------------


def _eval(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_command(tmp_path: Path) -> None:
    student, teacher = tiny_pair("qwen2", tmp_path)
    data = _write(tmp_path / "rows.jsonl", [row._asdict() for row in ROWS])
    asked = (
        student,
        "--metrics",
        "kl,repetition",
        "--teacher",
        teacher,
        "--data",
        data,
        "--max-new-tokens",
        "6",
    )
    for limit in ("2", "3", "2"):
        result = _eval(*asked, "--limit", limit, "--output", tmp_path / "out")
        assert result.exit_code == 0, result.output
    assert "reverse kl" in result.output
    entries = json.loads((tmp_path / "out" / "evals.json").read_text())
    assert [entry["limit"] for entry in entries] == [3, 2]  # a repeated measurement replaces itself
    assert entries[0]["distribution"]["dataset"]["forward_kl"]["value"] > 0
    alone = _eval(student, "--metrics", "entropy", "--metrics-on", "dataset", "--data", data)
    assert alone.exit_code == 0, alone.output
    assert "student entropy" in alone.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--metrics", "kl", "--data", "rows.jsonl"), "--teacher"),
        (("--metrics", "entropy"), "--data FILE"),
        (("--metrics", "entropy", "--data", "rows.jsonl", "--samples", "2"), "--samples"),
        (("--metrics", "entropy", "--data", "rows.jsonl", "--vocabulary", "pad"), "shared_prefix"),
        (("--metrics", "entropy", "--data", "rows.jsonl", "--few-shot", "2"), "no effect"),
        (("--metrics-on", "dataset", "--data", "rows.jsonl"), "no effect"),
    ],
)
def test_command_errors(tmp_path: Path, arguments: tuple[str, ...], message: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "rows.jsonl", [row._asdict() for row in ROWS])
    result = _eval("nowhere/model", *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_thoughts_do_not_count_in_lengths_and_repetition(pair) -> None:
    """One row three ways: as it is, behind thoughts, and as thoughts that never end."""
    student, _, tokenizer = pair
    answer = "one two three"
    rows = [TextRow("1?", text) for text in (answer, "<think>" + "again " * 9 + "</think>" + answer)]
    rows.append(TextRow("1?", "<think>" + "again " * 9))
    reports = [
        distribution_metrics(
            student, None, tokenizer, [row], ("length", "repetition"), SETTINGS, texts=("dataset",)
        )["dataset"]
        for row in rows
    ]
    plain, thoughtful, endless = (report["tokens_per_text"]["value"] for report in reports)
    assert plain == thoughtful > endless >= 0
    assert reports[1]["longest_loop_tokens"]["value"] == reports[0]["longest_loop_tokens"]["value"]
    assert [report.get("rows_with_thinking") for report in reports] == [None, 1, 1]
