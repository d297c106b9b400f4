"""What a step and a start must not do: wait for the device, tokenize twice, mix lengths when asked not to."""

import json
import os
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from helpers.trainers import make_trainer, rows, weights
from tiny_models import NUM_TOKENS, tiny_pair
from torch.utils._python_dispatch import TorchDispatchMode

from hpd.config.guards import GuardsConfig, Thresholds


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("method", ["hpd", "forward_kl", "akl", "abkd", "hpd_full"])
def test_a_micro_batch_reads_nothing_from_the_device(pair, tmp_path, monkeypatch, method):
    """On the meta device tensors have no values: whoever asks for one (`.item()`, `if tensor`, `.cpu()`)
    fails."""
    trainer = make_trainer(pair, tmp_path, method=method)
    batch = {name: value.to("meta") for name, value in next(iter(trainer.get_train_dataloader())).items()}
    # transformers itself looks at a mask of padding, once a forward (`create_causal_mask`); it takes a whole
    # one as it is.
    size, tokens = batch["input_ids"].shape
    batch["attention_mask"] = torch.ones(size, 1, tokens, tokens, dtype=torch.bool, device="meta")
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda device: False
    )  # it knows no device without values
    trainer.model.to("meta")
    trainer.teacher.model.to("meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        batch["label_labels"].max().item()
    count = torch.ones((), device="meta")
    loss = trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=count)
    loss.backward()
    assert all(p.grad is not None for p in trainer.model.parameters())
    assert all(value.device.type == "meta" for value in trainer.sums["train"].state_dict().values())


class _Reads(TorchDispatchMode):
    """Counts what makes a host wait for its device, by the function that asked."""

    def __init__(self):
        super().__init__()
        self.by_caller = Counter()

    def count(self):
        frames = [
            f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__
        ]
        file = Path(frames[-1].filename)
        self.by_caller[f"{file.parent.name}/{file.name}:{frames[-1].name}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "equal",
            "_unique2",
        ):
            self.count()
        return func(*args, **(kwargs or {}))


def reads_of(trainer, monkeypatch):
    with _Reads() as reads, monkeypatch.context() as patch:
        # On a CPU these three copy nothing, so that no operation shows them.
        for name in ("tolist", "cpu", "numpy"):
            original = getattr(torch.Tensor, name)
            patch.setattr(
                torch.Tensor, name, lambda self, *a, f=original, **k: (reads.count(), f(self, *a, **k))[1]
            )
        trainer.train()
    return reads.by_caller


def test_whole_steps_read_only_at_logs(pair, tmp_path, monkeypatch):
    """Four times the micro-batches between the same two logs: none of our reads may grow with them."""
    options = {"train": rows(64), "per_device_train_batch_size": 1, "max_steps": 4, "logging_steps": 2}
    few = reads_of(make_trainer(pair, tmp_path / "a", gradient_accumulation_steps=2, **options), monkeypatch)
    many = reads_of(make_trainer(pair, tmp_path / "b", gradient_accumulation_steps=8, **options), monkeypatch)
    assert few["training/metrics.py:reduce_sums"] == many["training/metrics.py:reduce_sums"] == 2
    growing = {name for name in many if many[name] > few[name]}
    # Where the tensors are on the CPU already: whether labels are in range, and whether there is a factor to
    # scale by; the test above shows that no other device is asked. The collator runs on the CPU, in the
    # loader's workers if there are any.
    on_cpu_only = {
        "losses/operator.py:_check",
        "losses/chunked.py:backward",
        "data/collator.py:_of_one",
        "hpd/batch.py:token_batch",
        "hpd/batch.py:_row_keys",
    }
    # transformers' own: whether a mask of padding is all ones, once a forward pass of either model.
    of_transformers = {"transformers/masking_utils.py:_ignore_causal_mask_sdpa"}
    assert growing <= on_cpu_only | of_transformers, growing


@pytest.mark.slow
def test_second_start_tokenizes_nothing(pair, tmp_path):
    """`hpd train` twice with one cache: the second run makes no new file in it."""
    questions = [{"question": f"add {i} and {i}:", "answer": f" {2 * i}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    data = {
        "path": str(tmp_path / "rows.jsonl"),
        "columns": {"prompt": "question", "completion": "answer"},
        "format": "chat",
        "validation": 0.2,
    }
    train = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": False,
        "max_length": 64,
    }
    recipe = {
        "student": str(pair[0]),
        "teacher": str(pair[1]),
        "data": data,
        "train": train,
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    written = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "hpd", "train", str(tmp_path / "recipe.yaml"), "--overwrite"],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        )
        assert done.returncode == 0, done.stderr
        written.append({path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")})
    assert len(written[0]) > 5
    assert written[1] == written[0]


def test_rows_of_a_length_come_together_when_asked(pair, tmp_path):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 60, (64,), generator=generator).tolist()
    train = [{"input_ids": [5 + j for j in range(n)]} for n in lengths]

    def padding(strategy):
        trainer = make_trainer(
            pair,
            tmp_path / strategy,
            train=train,
            per_device_train_batch_size=4,
            train_sampling_strategy=strategy,
        )
        masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
        assert sum(int(mask.sum()) for mask in masks) == sum(lengths)
        return sum(mask.numel() for mask in masks)

    assert padding("group_by_length") < 0.85 * padding("random")


def _counted(teacher, monkeypatch):
    """The number of passes through a live teacher, as a list that grows."""
    passes, scores = [], teacher.scores
    monkeypatch.setattr(teacher, "scores", lambda *given: passes.append(1) or scores(*given))
    return passes


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_steps_that_read_nothing_of_the_teacher_do_not_run_it(pair, tmp_path, monkeypatch, impl):
    trainers = {
        stride: make_trainer(
            pair,
            tmp_path / str(stride),
            method="sft",
            evaluation=rows(4),
            metric_stride=stride,
            max_steps=2,
            impl=impl,
        )
        for stride in (0, 1)
    }
    passes = {stride: _counted(trainer.teacher, monkeypatch) for stride, trainer in trainers.items()}
    for trainer in trainers.values():
        trainer.train()
    assert [len(passes[stride]) for stride in (0, 1)] == [0, 2]
    without, asked = (trainers[stride].state.log_history for stride in (0, 1))
    assert [log["loss"] for log in without[:2]] == [log["loss"] for log in asked[:2]]
    assert torch.equal(weights(trainers[0]), weights(trainers[1]))
    assert "forward_kl" in asked[0]
    assert not {"forward_kl", "teacher_tail_mass", "teacher_mass_outside"} & without[0].keys()
    # Validation compares the two models, whatever training does.
    compared = [trainers[stride].evaluate()["eval_forward_kl"] for stride in (0, 1)]
    assert compared[0] == compared[1] > 0.0
    assert passes[0]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("masked_sft", {}),
        ("psft", {}),
        ("sft", {"guards": GuardsConfig(support_overlap=Thresholds(warn=0.1))}),
        ("sft", {"metric_stride": 16}),
    ],
)
def test_steps_that_read_the_teacher_run_it(pair, tmp_path, monkeypatch, method, options):
    trainer = make_trainer(pair, tmp_path, **{"method": method, "metric_stride": 0, **options})
    passes = _counted(trainer.teacher, monkeypatch)
    trainer.train()
    assert len(passes) == 1


def test_without_the_teacher_the_softmax_keeps_to_the_common_vocabulary(tmp_path):
    """A teacher with fewer tokens cuts the student's softmax, read or not."""
    pair = tiny_pair("llama", tmp_path / "pair", student_vocab=NUM_TOKENS + 40)
    losses = []
    for stride in (0, 1):
        trainer = make_trainer(
            pair, tmp_path / str(stride), method="sft", metric_stride=stride, vocabulary="shared_prefix"
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == losses[1]
