"""scripts/gpu_evidence.py: problems are right, the decoder decodes, a kill costs nothing, torch is enough."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_evidence
import pytest
import torch
from evidence.decoder import Decoder, KeysValues, Shape, write
from evidence.problems import END, WordProblems
from evidence.report import PREDICTIONS, chosen_rates, table, verdicts
from evidence.settings import FULL, METHODS, TINY, Regime
from evidence.training import (
    Clock,
    OutOfTimeError,
    accuracies,
    cache,
    distill,
    drawn,
    measure,
    pretrain,
    tensors,
)

LANGUAGE = WordProblems(TINY.vocab)
CPU = torch.device("cpu")
SMALL = dataclasses.replace(
    TINY, teacher_steps=20, look_every=5, regimes=(Regime("repeated", 10, 4),), batch=5, points=2, problems=4
)

# A folder on the path whose packages cannot be imported: a machine with torch and numpy.
BLOCKED = (
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "pydantic",
    "jaxtyping",
    "xxhash",
    "yaml",
    "pandas",
    "scipy",
)


# ---- problems


def test_every_solution_is_right_and_every_prompt_has_one_length():
    for problem in drawn(LANGUAGE, "any", 300):
        assert len(problem.prompt) == LANGUAGE.prompt_length
        assert len(problem.solution) <= LANGUAGE.longest_solution
        text = LANGUAGE.decode(problem.solution)
        equations = re.findall(r"(\d+ [-+*] \d+) = (\d+)", text)
        assert len(equations) == 3
        for left, right in equations:
            assert eval(left) == int(right)
        assert int(equations[-1][1]) == problem.answer == LANGUAGE.answer(problem.solution)


def test_the_prompt_leads_to_the_answer():
    """Worked out from the words of the prompt alone."""
    signs = {"finds": "+", "more": "+", "loses": "-", "away": "-", "times": "*"}
    for problem in drawn(LANGUAGE, "story", 100):
        start, *events, _ = [
            LANGUAGE.decode(problem.prompt[i : i + 8]).split() for i in range(0, len(problem.prompt), 8)
        ]
        value = int(next(word for word in start if word.isdigit()))
        for event in events:
            sign = next(signs[word] for word in event if word in signs)
            value = eval(f"{value} {sign} {next(word for word in event if word.isdigit())}")
        assert value == problem.answer


def test_the_vocabulary_is_full_of_different_words():
    language = WordProblems(FULL.vocab)
    assert len(language.words) == len(set(language.words)) == FULL.vocab >= 16_000
    assert len(language.names) > 8_000 < len(language.things)


def test_no_vocabulary_without_names():
    with pytest.raises(ValueError, match="at least 1.., got 100"):
        WordProblems(100)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 3 = 5 , #### 5 <end>", 5),
        ("2 + 3 = 5 , #### 5 <end> #### 7 <end>", 5),
        ("2 + 3 = 5 , #### 5", None),  # never ended
        ("2 + 3 = 5 , 5 <end>", None),
        ("#### 5 5 <end>", None),
        ("#### <end>", None),
        ("<end>", None),
    ],
)
def test_what_counts_as_an_answer(text: str, answer: int | None):
    assert LANGUAGE.answer(LANGUAGE.encode(text)) == answer


# ---- decoder


def test_one_token_at_a_time_is_all_at_once():
    model = Decoder(Shape(2, 32, 4), 50, seed=0)
    tokens = torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(0))
    whole = model(tokens)
    kept = KeysValues(model.shape, 3, 9, model.head)
    parts = [model(tokens[:, :4], kept), *(model(tokens[:, i : i + 1], kept) for i in range(4, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_a_later_token_changes_nothing_before_it():
    model = Decoder(Shape(2, 32, 4), 50, seed=0)
    tokens = torch.arange(9)[None]
    other = tokens.clone()
    other[0, 6] = 40
    same = (model(tokens) == model(other)).all(-1)[0]
    assert same.tolist() == [True] * 6 + [False] * 3


def test_greedy_and_a_tiny_top_p_write_the_likeliest_token_and_a_draw_does_not():
    model = Decoder(Shape(1, 32, 4), 50, seed=1)
    prompts = torch.arange(12).view(4, 3)
    greedy = write(model, prompts, 6, end=END)
    assert torch.equal(greedy, write(model, prompts, 6, END, temperature=0.7, top_p=1e-6))
    drawn_once = write(model, prompts, 6, END, temperature=1.0, seed=3)
    assert torch.equal(drawn_once, write(model, prompts, 6, END, temperature=1.0, seed=3))
    assert not torch.equal(greedy, drawn_once)
    logits = model(prompts)[:, -1] @ model.head.t()
    assert torch.equal(greedy[:, 0], logits.argmax(-1))


def test_nothing_is_written_behind_the_end():
    model = Decoder(Shape(1, 32, 4), 6, seed=1)
    texts = write(model, torch.zeros(64, 2, dtype=torch.long), 12, END, temperature=1.0)
    for text in texts.tolist():
        if END in text:
            assert set(text[text.index(END) :]) == {END}
    assert any(END in text[:-1] for text in texts.tolist())


# ---- training


def _teacher(folder: Path, minutes: float = 9.0) -> dict[str, Any]:
    path = folder / "teacher.pt"
    return pretrain(path, SMALL.teacher, 0, SMALL.teacher_steps, SMALL, LANGUAGE, CPU, Clock(minutes))


def test_a_part_of_the_experiment_on_a_small_model(tmp_path):
    """Pretraining that stops at every look ends with the weights of one that does not; a teacher is at no
    distance from its own cache but that of bfloat16; a student comes nearer to it."""
    whole = _teacher(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    stops = 0
    while not (other / "teacher.pt").exists() or not torch.load(other / "teacher.pt").get("done"):
        try:
            _teacher(other, minutes=0.0)
        except OutOfTimeError:
            stops += 1
    assert stops == 3
    again = torch.load(other / "teacher.pt")
    assert again["losses"] == whole["losses"]
    assert all(torch.equal(again["model"][name], value) for name, value in whole["model"].items())

    teacher = Decoder(SMALL.teacher, SMALL.vocab, 0)
    teacher.load_state_dict(whole["model"])
    rows, held_out = (cache(teacher, tensors(LANGUAGE, drawn(LANGUAGE, n, 10)), LANGUAGE) for n in "ab")
    own = measure(teacher, held_out, LANGUAGE)
    assert 0.0 <= own["forward_kl"] < 1e-3
    assert own["student_entropy"] == pytest.approx(own["teacher_entropy"], abs=5e-3)

    start = Decoder(SMALL.student, SMALL.vocab, 1)
    before = measure(start, held_out, LANGUAGE)
    student, found = distill(
        start.state_dict(), "hpd_full", SMALL.regimes[0], 1e-2, 0, SMALL, LANGUAGE, rows, held_out
    )
    assert [point["epoch"] for point in found["curve"]] == [2.0, 4.0]
    assert found["curve"][-1]["forward_kl"] < 0.9 * before["forward_kl"]
    shares = accuracies(student, drawn(LANGUAGE, "test", 4), SMALL, LANGUAGE, CPU)
    assert set(shares) == {"accuracy_greedy", "accuracy_paper", "accuracy_t1"}


def test_tertiles_are_thirds_by_the_teachers_entropy():
    teacher = Decoder(SMALL.teacher, SMALL.vocab, 3)
    # Sharper, so that positions differ.
    teacher.embed.weight.data.mul_(20)
    held_out = cache(teacher, tensors(LANGUAGE, drawn(LANGUAGE, "c", 8)), LANGUAGE)
    _, mask = held_out.rows.labels(LANGUAGE.prompt_length)
    assert torch.equal(held_out.tertile >= 0, mask)
    logits = held_out.hidden.float() @ held_out.head.float().t()
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(held_out.log_z[mask], logits.logsumexp(-1)[mask])
    parts = [entropy[held_out.tertile == third] for third in range(3)]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert parts[0].max() <= parts[1].min() + 1e-4
    assert parts[1].max() <= parts[2].min() + 1e-4


# ---- report


def _lines(**better: float) -> list[dict[str, Any]]:
    """Runs of one initialization whose figures are all 1 but those named METHOD_REGIME."""
    names = ("forward_kl", "forward_kl_low", "forward_kl_middle", "forward_kl_high", "student_entropy")
    return [
        {"role": "main", "method": method, "regime": regime, "initialization": 0, "rate": 0.1}
        | dict.fromkeys(names, better.get(f"{method}_{regime}", 1.0))
        for method in METHODS
        for regime in ("repeated", "single")
    ]


def test_predictions_are_judged_by_every_initialization():
    teacher = {"student_entropy": 1.5}
    of = {v["prediction"]: v for v in verdicts(_lines(hpd_repeated=0.5), teacher)}
    entropy, nearer = (of[PREDICTIONS[i].text] for i in (0, 1))
    assert (entropy["margins"], entropy["verdict"]) == ([0.5], "holds in each initialization")
    assert (nearer["margins"], nearer["verdict"]) == ([0.5], "holds in each initialization")
    assert of[PREDICTIONS[3].text]["verdict"] == "fails in each initialization"
    second = [line | {"initialization": 1} for line in _lines(hpd_repeated=1.5)]
    both = {v["prediction"]: v for v in verdicts([*_lines(hpd_repeated=0.5), *second], teacher)}
    assert both[PREDICTIONS[1].text] == {
        "prediction": PREDICTIONS[1].text,
        "margins": [0.5, -0.5],
        "verdict": "undecided",
    }
    assert {v["verdict"] for v in verdicts([], teacher)} == {"not run"}


def test_a_tie_of_rates_goes_to_the_smaller_one_and_is_said():
    low, middle, high = 1e-4, 3e-4, 1e-3
    settings = dataclasses.replace(FULL, rates=(low, middle, high))

    def tuned(*values: float) -> dict[str, Any]:
        lines = [
            {"role": "tune", "method": "hpd", "regime": "single", "rate": rate, "forward_kl": value}
            for rate, value in zip(settings.rates, values, strict=False)
        ]
        return chosen_rates(lines, settings)

    assert tuned(1.0, 0.5) == {}
    assert tuned(1.0, 0.5, 0.7) == {"hpd single": {"rate": middle, "tie": False, "at_edge": False}}
    assert tuned(1.0, 0.502, 0.5) == {"hpd single": {"rate": middle, "tie": True, "at_edge": False}}
    assert tuned(1.0, 0.7, 0.5) == {"hpd single": {"rate": high, "tie": False, "at_edge": True}}
    assert tuned(0.5, 0.7, 0.5)["hpd single"]["rate"] == low


def test_a_table_without_runs_has_the_teachers_line():
    assert table([], {"student_entropy": 0.25}, TINY).splitlines()[-1].startswith("| teacher |")


# ---- the command


def _command(folder: Path, tmp_path: Path, *more: str) -> tuple[list[str], dict[str, str]]:
    blocks = tmp_path / "blocks"
    for name in BLOCKED:
        (blocks / name).mkdir(parents=True, exist_ok=True)
        (blocks / name / "__init__.py").write_text(f"raise ImportError('{name} is not installed here')\n")
    environment = os.environ | {"PYTHONPATH": str(blocks), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = gpu_evidence.__file__
    return [sys.executable, script, "--tiny", "--output", str(folder), *more], environment


def test_torch_alone_is_enough_to_start(tmp_path):
    command, environment = _command(tmp_path / "run", tmp_path, "--estimate")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "PFLOP" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("options", "message"), [((), "give --tiny"), (("--tiny",), "another folder")])
def test_what_cannot_be_run_is_refused(options, message, tmp_path, monkeypatch, capsys):
    """The full experiment without a GPU; a folder that holds an experiment of other settings."""
    (tmp_path / "results.jsonl").write_text('{"role": "predictions", "predictions": [], "settings": {}}\n')
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_evidence.py", "--output", str(tmp_path), *options])
    with pytest.raises(SystemExit) as stopped:
        gpu_evidence.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1


PUBLISHED = Path(gpu_evidence.__file__).resolve().parents[1] / "docs" / "results" / "one_gpu"


def test_the_published_runs_are_drawn(tmp_path):
    paths = gpu_evidence.plot(PUBLISHED, FULL, tmp_path)
    assert [path.stat().st_size > 10_000 for path in paths] == [True, True]


@pytest.mark.parametrize(
    ("settings", "source", "folder", "message"),
    [
        (TINY, PUBLISHED, ".", "no experiment of these settings"),
        (FULL, Path("nowhere"), ".", "no experiment of these settings"),
        (FULL, PUBLISHED, "nowhere", "no such folder"),
    ],
)
def test_what_cannot_be_drawn_is_said(settings, source, folder, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        gpu_evidence.plot(source, settings, tmp_path / folder)


def _figures(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
    return sorted(lines, key=json.dumps)


@pytest.mark.slow
def test_a_killed_experiment_goes_on_and_ends_with_the_same_numbers(tmp_path):
    command, environment = _command(tmp_path / "whole", tmp_path)
    whole = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    assert "hpd_full" in (tmp_path / "whole" / "report.md").read_text()

    folder = tmp_path / "parts"
    results = folder / "results.jsonl"
    # Killed when it has so many lines, or left alone until it ends by itself. Of 45 lines the first is there
    # before anything is trained; with no minutes it stops at its first look, in the teacher's pretraining.
    for lines, minutes, code in ((1, 60, -9), (None, 0, 75), (12, 60, -9), (25, 60, -9), (None, 60, 0)):
        command, environment = _command(folder, tmp_path, "--minutes", str(minutes))
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        while lines and not (results.exists() and results.read_text().count("\n") >= lines):
            assert process.poll() is None
            time.sleep(0.02)
        if lines:
            process.kill()
        assert process.wait() == code
        head = json.loads(results.read_text().splitlines()[0])
        assert head["predictions"] == [prediction.text for prediction in PREDICTIONS]
    assert _figures(folder) == _figures(tmp_path / "whole")
