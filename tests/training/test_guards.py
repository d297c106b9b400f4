"""Guards: what they see in metrics, and that they stop a run and save it."""

import pytest
import torch
from helpers.trainers import make_trainer, rows
from tiny_models import tiny_pair

from hpd.config.schema import GuardsConfig, Thresholds
from hpd.losses import Head, Scores
from hpd.methods.prefixes import Prefixes, RolloutConfig
from hpd.training.guards import check_metrics, support_overlap


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))


def found(config, logs, history=()):
    return [(finding.guard, finding.level) for finding in check_metrics(config, logs, history)]


ALL = GuardsConfig(
    length_ratio=Thresholds(warn=2.0, stop=4.0),
    truncated=Thresholds(warn=0.5),
    repetition=Thresholds(stop=0.3),
    entropy=Thresholds(warn=0.5),
    support_overlap=Thresholds(warn=0.2),
    negative_divergence=Thresholds(stop=-1e-3),
)


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        (
            {
                "rollouts/length_ratio": 1.9,
                "rollouts/truncated": 0.4,
                "student_entropy": 1.1,
                "forward_kl": 0.0,
            },
            [],
        ),
        ({"rollouts/length_ratio": 3.0}, [("length_ratio", "warn")]),
        ({"rollouts/length_ratio": 4.5}, [("length_ratio", "stop")]),
        ({"rollouts/truncated": 0.6}, [("truncated", "warn")]),
        ({"rollouts/repetition": 0.35}, [("repetition", "stop")]),
        ({"student_entropy": 0.9}, [("entropy", "warn")]),
        ({"support_overlap": 0.1}, [("support_overlap", "warn")]),
        ({"forward_kl": 0.1, "reverse_kl": -0.01}, [("negative_divergence", "stop")]),
        ({"loss": float("nan")}, [("non_finite", "stop")]),
        ({"loss": 1.0, "grad_norm": float("inf")}, [("non_finite", "stop")]),
    ],
)
def test_thresholds(logs, expected):
    assert found(ALL, logs, [{"loss": 3.0}, {"student_entropy": 2.0}, {"student_entropy": 0.1}]) == expected


def test_entropy_collapses_below_the_teachers_and_not_on_the_way_to_it():
    config = GuardsConfig(entropy=Thresholds(warn=0.5))
    history = [{"student_entropy": 3.0}]
    assert found(config, {"student_entropy": 0.1, "teacher_entropy": 0.08}, history) == []
    assert found(config, {"student_entropy": 0.05, "teacher_entropy": 0.08}, history) == []
    ((guard, _, text),) = check_metrics(config, {"student_entropy": 0.03, "teacher_entropy": 0.08}, history)
    assert guard == "entropy"
    assert "38% of the teacher's" in text
    # A teacher that gives the label's log-probability only has no entropy that is known.
    ((_, _, text),) = check_metrics(config, {"student_entropy": 0.6}, history)
    assert "20% of what it was at the run's start" in text


def test_switched_off():
    off = GuardsConfig(
        non_finite="off", **{n: Thresholds() for n in ("length_ratio", "truncated", "repetition", "entropy")}
    )
    assert found(off, {"loss": float("nan"), "rollouts/length_ratio": 100.0, "rollouts/truncated": 1.0}) == []


def test_overlap_of_likeliest_tokens():
    mine, theirs = torch.tensor([[3.0, 2, 1, 0], [3, 2, 1, 0]]), torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3]])
    total, count = support_overlap(
        Scores(mine, Head(None)), Scores(theirs, Head(None)), torch.zeros(2).long(), 2, 1
    )
    assert (float(total), float(count)) == (1.0, 2.0)
    total, count = support_overlap(
        Scores(mine, Head(None)), Scores(theirs, Head(None)), torch.zeros(2).long(), 3, 1
    )
    assert float(total) == pytest.approx(1.0 + 2 / 3)


def test_a_stop_saves_and_ends_and_a_warning_goes_on(pair, tmp_path, caplog):
    options = {
        "method": "forward_kl",
        "prefixes": Prefixes(student=1.0),
        "rollouts": RolloutConfig(max_new_tokens=2),
        "max_steps": 6,
        "logging_steps": 2,
        "train": rows(48),
        "save_strategy": "no",
    }
    guards = GuardsConfig(truncated=Thresholds(stop=0.05), support_overlap=Thresholds(warn=1.0))
    stopped = make_trainer(pair, tmp_path / "a", guards=guards, **options)
    stopped.train()
    assert stopped.state.global_step == 2
    assert (tmp_path / "a" / "checkpoint-2" / "trainer_state.json").is_file()
    assert stopped.stopped_by.startswith("truncated")
    log = next(log for log in stopped.state.log_history if "loss" in log)
    assert log["guard/truncated"] == 1.0
    assert 0.0 < log["support_overlap"] < 1.0
    warned = make_trainer(
        pair, tmp_path / "b", guards=GuardsConfig(truncated=Thresholds(warn=0.05)), **options
    )
    warned.train()
    assert warned.state.global_step == 6
    assert caplog.text.count("guard truncated at step") == 2  # once for each run: a warning is not repeated
