"""Experiment D from its preparation to a run, on a tiny pair and problems of our own."""

import json
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_pair

from hpd.experiments.compare import compare
from hpd.files import JsonLines

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))


@pytest.fixture
def prepared(pair, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    sys.modules.pop("real_pair", None)
    import real_pair

    problems = [
        {
            "question": f"How many are {i} and {i + 1}?",
            "answer": f"{i} + {i + 1} = {2 * i + 1}\n#### {2 * i + 1}",
        }
        for i in range(60)
    ]
    source = tmp_path / "gsm8k.jsonl"
    source.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    monkeypatch.setenv("GSM8K", str(source))
    monkeypatch.setenv("HPD_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    student, teacher = map(str, pair)
    sizes = real_pair.Sizes(
        repair_rows=8, repair_steps=3, batch=4, most_rows=12, held_out=4, new_tokens=12, max_length=200
    )
    for name, value in {"TEACHER": teacher, "CUT": student, "CPU": sizes, "GPU": sizes}.items():
        monkeypatch.setattr(real_pair, name, value)
    yield real_pair
    sys.modules.pop("real_pair", None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["real_pair", "real_pair_gpu"])
def test_from_problems_to_a_run_of_each_text(prepared, tmp_path, name):
    _, failures = compare(
        EXPERIMENTS / f"{name}.yaml",
        [
            "set.train.bf16=false",
            "set.train.max_steps=2",
            "axes.data.limit=[8]",
            "axes.seed=[0, 1]",
            "variants={sft: {method: sft}, hpd: {method: hpd}}",
            "tune=null",
            "own_samples=2",
            "set.train.per_device_eval_batch_size=4",
            "set.train.metric_stride=1",
        ],
    )
    assert failures == []
    base = tmp_path / "runs" / name / "base"
    texts = {name: list(JsonLines(base / "rows" / f"{name}.jsonl").read()) for name in ("teacher", "human")}
    # The same problems in the same order; only the solutions differ.
    assert [row["prompt"] for row in texts["teacher"]] == [row["prompt"] for row in texts["human"]]
    assert len(texts["human"]) >= 8
    assert all(row["completion"].startswith(" ") and "####" in row["completion"] for row in texts["human"])
    assert all("####" not in row["completion"] for row in texts["teacher"])
    summaries = sorted((tmp_path / "runs" / name / "runs").glob("*/summary.json"))
    assert len(summaries) == 8
    # Both held-out texts are measured, whole and by thirds of the teacher's entropy.
    figures = json.loads((summaries[0].parent / "experiment.json").read_text())["figures"]
    for text in ("teacher", "human"):
        thirds = [figures[f"{text}_forward_kl_{level}_entropy"] for level in ("low", "mid", "high")]
        assert len(set(thirds)) == 3
        whole = json.loads(summaries[0].read_text())[f"{text}_forward_kl after"]
        assert sum(thirds) / 3 == pytest.approx(whole, rel=0.05)
    # Prepared once: another look changes nothing and trains nothing.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "home").rglob("*") if path.is_file()}
    getattr(prepared, name)(base)
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "home").rglob("*") if path.is_file()
    }
