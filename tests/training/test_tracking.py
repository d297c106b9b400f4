"""What trackers keep of a run: name, project, recipe, every value. The trackers themselves, offline.

TensorBoard runs by default; the others where `make test-engines` installed them.
"""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.forked import hpd
from tiny_models import tiny_pair

SECRET = "not-a-key-in-itself-4711"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracked")
    tiny_pair("llama", folder)
    rows = [{"prompt": f"say {i}:", "completion": f" {i}"} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "data": {"path": str(folder / "rows.jsonl"), "validation": 0.25},
        "terms": [{"objective": "forward_kl"}],
        "train": {
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "gradient_checkpointing": False,
            "max_length": 64,
            "save_strategy": "no",
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture
def train(place, tmp_path):
    """Run the recipe in an empty folder; the run is called as its folder."""

    def train(tracker: str, *overrides: str, **environment: str):
        environment["SOME_API_KEY"] = SECRET  # a value that nothing may repeat
        words = ["output_dir=runs/my-run", f"train.report_to={tracker}", *overrides]
        return hpd("train", place / "recipe.yaml", *words, cwd=tmp_path, environment=environment)

    return train


def check_recipe(config: dict, place: Path) -> None:
    assert str(config["recipe.student.model"]) == str(place / "student")
    assert str(config["recipe.terms.0.objective"]) == "forward_kl"
    assert str(config["recipe.train.max_steps"]) == "2"


def records_of_wandb(content: bytes) -> Iterator[Any]:
    """Of a `.wandb` file: LevelDB's log format (7 bytes before it; blocks of 32 KiB; a record's parts with
    checksum, length, and 1 or 4 for the last one), each record a protocol buffer."""
    from wandb.proto import wandb_internal_pb2  # pyright: ignore[reportMissingImports]

    place, parts = 7, b""
    while place + 7 <= len(content):
        if (room := 32768 - place % 32768) < 7:
            place += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def test_tensorboard(place, train, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    done = train("tensorboard")
    assert done.returncode == 0, done.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (tmp_path / "runs/my-run").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent)).Reload()
    kept = json.loads(events.Tensors("args/text_summary")[0].tensor_proto.string_val[0])
    assert (kept["run_name"], kept["project"]) == ("my-run", "hpd")
    check_recipe(kept, place)
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert "train/forward_kl" in events.Tags()["scalars"]
    # The evaluation after the last step, too.
    assert events.Scalars("eval/forward_kl")[-1].step == 2


@pytest.mark.engines
def test_weights_and_biases(place, train, tmp_path):
    pytest.importorskip("wandb")
    done = train("wandb", WANDB_MODE="offline", WANDB_SILENT="true")
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    content = next(run.glob("*.wandb")).read_bytes()
    assert SECRET.encode() not in content
    records = list(records_of_wandb(content))
    config = {
        update.key: json.loads(update.value_json)
        for record in records
        if record.WhichOneof("record_type") == "config"
        for update in record.config.update
    }
    check_recipe(config, place)
    (start,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (start.display_name, start.project) == ("my-run", "hpd")
    logged = [
        {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item if item.nested_key}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [row["train/global_step"] for row in logged if "train/loss" in row] == [1, 2]
    # The evaluation after the last step, too.
    assert [row["train/global_step"] for row in logged if "eval/forward_kl" in row][-1] == 2


@pytest.mark.engines
def test_mlflow_on_sqlite(place, train, tmp_path):
    pytest.importorskip("mlflow")
    done = train("mlflow", "train.project=counting", MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/runs.db")
    assert done.returncode == 0, done.stderr
    with sqlite3.connect(tmp_path / "runs.db") as database:
        runs = database.execute("select name, status, run_uuid from runs").fetchall()
        assert [run[:2] for run in runs] == [("my-run", "FINISHED")]
        experiments = database.execute("select name from experiments").fetchall()
        assert ("counting",) in experiments
        params = dict(database.execute("select key, value from params").fetchall())
        check_recipe(params, place)
        steps = database.execute("select step from metrics where key = 'eval/forward_kl'").fetchall()
        assert (2,) in steps or (2,) in database.execute(
            "select step from metrics where key = 'eval_forward_kl'"
        ).fetchall()


@pytest.mark.engines
def test_trackio(place, train, tmp_path):
    pytest.importorskip("trackio")
    done = train("trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "trackio").glob("hpd*.db")
    with sqlite3.connect(file) as database:
        names = [row[0] for row in database.execute("select distinct run_name from metrics")]
        assert names == ["my-run"]
        kept = json.loads(database.execute("select config from configs").fetchone()[0])
        check_recipe(kept, place)


@pytest.mark.engines
def test_what_cannot_be_started_is_said_before_models_load(place, train, tmp_path):
    pytest.importorskip("mlflow")
    (tmp_path / "file").touch()  # no folder, and MLflow makes missing ones
    done = train("mlflow", MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/file/runs.db")
    assert done.returncode == 2
    assert "train.report_to: mlflow could not be started" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
    assert "training" not in done.stdout
