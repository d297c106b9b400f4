"""Run by tests/training/test_distributed.py under torchrun: many checks in one launch, since starting a
process takes most of the time.

Usage: torchrun --nproc_per_node N distributed_checks.py STUDENT_FOLDER OUTPUT NAME...

Every check writes NAME-N.json from its first process: logs, the largest difference between processes'
weights, and the weights of the trained student beside it. What a single process finds is written by the same
script, started with N = 1.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from datasets import Dataset
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpd import DistillConfig, DistillTrainer, TermConfig
from hpd.batch import token_batch, uniforms
from hpd.losses import reweighted_nll
from hpd.methods import choose_terms, name_terms
from hpd.methods.prefixes import Prefixes, RolloutConfig
from hpd.models.forward import add_head_function, model_inputs, scores_of
from hpd.teachers import SelfTeacher
from hpd.training import engines
from hpd.training.stopping import leaving_processes

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
GLOBAL_BATCH = 8
DESCENT = {"optim": "sgd", "learning_rate": 0.3}
"""Adam would divide gradients that are next to nothing by their own size, and follow their rounding."""
_REGIME = ("prefixes", "rollouts", "method", "terms", "teacher", "teacher_tokenizer", "peft_config")


def rows(count: int) -> Dataset:
    """Different rows of different lengths."""
    return Dataset.from_list(
        [
            {
                "prompt": f"say {WORDS[i % 10]} {WORDS[i // 10]}:",
                "completion": " " + " ".join(WORDS[: 1 + (3 * i) % 7]),
            }
            for i in range(count)
        ]
    )


def with_hint(row: dict) -> dict:
    """What a teacher reads that sees the answer."""
    return {"teacher_prompt": f"answer{row['completion']}. {row['prompt']}"}


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def make_trainer(
    pair: Path, folder: Path, count: int = 24, accumulation: int = 1, **options
) -> DistillTrainer:
    """A trainer whose global batch is 8 rows on any number of processes."""
    regime = {
        name: options.pop(name) for name in (*_REGIME, "train_dataset", "eval_dataset") if name in options
    }
    evaluation = options.pop("evaluation", 0)
    regime = {"train_dataset": rows(count), "eval_dataset": rows(evaluation) if evaluation else None} | regime
    if options.pop("hinted", False):
        regime["train_dataset"] = regime["train_dataset"].map(with_hint)
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": GLOBAL_BATCH // accumulation // world_size(),
        "gradient_accumulation_steps": accumulation,
        "gradient_checkpointing": False,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "metric_stride": 1,
        "dataset_num_proc": None,
        "max_length": 64,
        "use_cpu": True,
        "bf16": False,
        "per_device_eval_batch_size": 2,
    }
    load = AutoModelForCausalLM.from_pretrained
    return DistillTrainer(
        model=load(pair / "student"),
        teacher=regime.pop("teacher", None) or load(pair / "teacher"),
        args=DistillConfig(output_dir=str(folder), **{**settings, **options}),
        processing_class=AutoTokenizer.from_pretrained(pair / "student"),
        **regime,
    )


def whole_weights(trainer: DistillTrainer) -> torch.Tensor:
    parameters = (p.detach() for p in trainer.accelerator.unwrap_model(trainer.model).parameters())
    return torch.cat(
        [(p.full_tensor() if hasattr(p, "full_tensor") else p).flatten().double() for p in parameters]
    )


def report(name: str, output: Path, weights: torch.Tensor, logs: list[dict], **more) -> None:
    spread = 0.0
    if distributed.is_initialized():
        others = [torch.empty_like(weights) for _ in range(world_size())]
        distributed.all_gather(others, weights)
        spread = max(float((other - weights).abs().max()) for other in others)
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(weights, output / f"{name}-{world_size()}.pt")
        (output / f"{name}-{world_size()}.json").write_text(
            json.dumps({"logs": logs, "spread": spread, **more})
        )


def trained(name: str, pair: Path, output: Path, **options) -> None:
    trainer = make_trainer(pair, output / f"{name}-{world_size()}", **options)
    trainer.train()
    engine = trainer.accelerator.distributed_type.value
    report(name, output, whole_weights(trainer), trainer.state.log_history, engine=engine)


def plain(pair: Path, output: Path) -> None:
    """HPD, whose draws must not depend on the number of processes."""
    trained("plain", pair, output)


def accumulated(pair: Path, output: Path) -> None:
    trained("accumulated", pair, output, accumulation=2)


def uneven(pair: Path, output: Path) -> None:
    """11 rows: of the last batch, some processes see only masked labels. The evaluation's rows are uneven
    too."""
    options = {
        "max_steps": -1,
        "num_train_epochs": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "evaluation": 5,
    }
    trained("uneven", pair, output, count=11, **options)


def rollouts(pair: Path, output: Path) -> None:
    """The student writes most rows; the filling of the last batch is not continued."""
    options = {
        "method": "forward_kl",
        "prefixes": Prefixes(student=0.7),
        "rollouts": RolloutConfig(max_new_tokens=5),
    }
    trained("rollouts", pair, output, count=11, max_steps=2, **options)


def own_rows(pair: Path, output: Path) -> None:
    """The teacher reads prompts of its own, on the dataset's rows and on the student's; the last batch is
    uneven."""
    options = {
        "method": "forward_kl",
        "prefixes": Prefixes(student=0.5),
        "rollouts": RolloutConfig(max_new_tokens=5),
    }
    trained("own_rows", pair, output, count=11, max_steps=2, hinted=True, **options)


def two_tokenizers(pair: Path, output: Path) -> None:
    """The teacher has a tokenizer of its own; the last batch is uneven."""
    trained("two_tokenizers", pair, output, **_other_teacher(pair))


def written_in_bytes(pair: Path, output: Path) -> None:
    """The same for rows that the student writes."""
    writing = {"prefixes": Prefixes(student=0.5), "rollouts": RolloutConfig(max_new_tokens=5)}
    trained("written_in_bytes", pair, output, **_other_teacher(pair), **writing)


def _other_teacher(pair: Path) -> dict:
    pieces = pair / "pieces"
    return {
        "teacher": AutoModelForCausalLM.from_pretrained(pieces),
        "teacher_tokenizer": AutoTokenizer.from_pretrained(pieces),
        "vocabulary": "bytes",
        "count": 11,
        "max_steps": 2,
        **DESCENT,
    }


def averaged(pair: Path, output: Path) -> None:
    """The teacher is the student's moving average, and reads the answer; the last batch is uneven."""
    trained("averaged", pair, output, **_average())


def _average() -> dict:
    terms = [TermConfig(objective="nll"), TermConfig(objective="forward_kl", cap=0.05)]
    return {"terms": terms, "hinted": True, "count": 11, "teacher": SelfTeacher(0.3), **DESCENT}


def low_precision(pair: Path, output: Path) -> None:
    """bfloat16 autocast with gradient checkpointing."""
    trained("low_precision", pair, output, bf16=True, gradient_checkpointing=True)


def cached(pair: Path, output: Path) -> None:
    """Every process reads its own rows from one cache; the last batch is uneven, and its filling is not in
    the cache."""
    from hpd.teachers import CachedTeacher

    trained("cached", pair, output, count=11, max_steps=2, teacher=CachedTeacher(pair / "cache"))


def self_teacher(pair: Path, output: Path) -> None:
    """Beside the labels: on its own, a KL to oneself starts at zero, and Adam follows the rounding."""
    terms = [TermConfig(objective="nll"), TermConfig(objective="forward_kl")]
    trained("self_teacher", pair, output, teacher="self", terms=terms)


def resumed(pair: Path, output: Path) -> None:
    """Two steps, then as a new trainer from their checkpoint."""
    folder = output / f"resumed-{world_size()}"
    make_trainer(
        pair, folder, max_steps=2, lr_scheduler_type="constant", save_strategy="steps", save_steps=2
    ).train()
    again = make_trainer(pair, folder, lr_scheduler_type="constant", save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    report("resumed", output, whole_weights(again), again.state.log_history)


def straight(pair: Path, output: Path) -> None:
    trained("straight", pair, output, lr_scheduler_type="constant")


def let_fsdp_run_on_cpu(**settings) -> None:
    """Lift the one condition that keeps accelerate from FSDP on a CPU; everything after it is what runs on
    GPUs."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def patched(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = patched
    engines._UNSHARDED = ()


def fsdp2(pair: Path, output: Path) -> None:
    """`DistillTrainer` with accelerate's FSDP2: student and teacher sharded, validation before training,
    whole export."""
    if world_size() > 1:
        let_fsdp_run_on_cpu()
    options = {"fsdp": True, "fsdp_config": {"version": 2}} if world_size() > 1 else {}
    folder = output / f"fsdp2-{world_size()}"
    trainer = make_trainer(
        pair, folder, evaluation=5, eval_on_start=True, eval_strategy="steps", eval_steps=2, **options
    )
    trainer.train()
    trainer.save_model()
    local = {}
    for name, model in (("student", trainer.model), ("teacher", trainer.teacher.model)):
        parts = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
        local[name] = sum(p.numel() for p in parts) / sum(p.numel() for p in model.parameters())
    owned = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    teacher_owned = sum(id(p) in owned for p in trainer.teacher.model.parameters())
    report(
        "fsdp2",
        output,
        whole_weights(trainer),
        trainer.state.log_history,
        engine=trainer.accelerator.distributed_type.value,
        local_share=local,
        teacher_in_optimizer=teacher_owned,
    )


def fsdp2_averaged(pair: Path, output: Path) -> None:
    """The moving average of a sharded student is sharded too."""
    under_fsdp2("fsdp2_averaged", pair, output, **_average())


def fsdp2_two_tokenizers(pair: Path, output: Path) -> None:
    under_fsdp2("fsdp2_two_tokenizers", pair, output, **_other_teacher(pair))


def under_fsdp2(name: str, pair: Path, output: Path, **options) -> None:
    """`trained`, sharded where there are several processes."""
    if world_size() > 1:
        let_fsdp_run_on_cpu()
        options |= {"fsdp": True, "fsdp_config": {"version": 2}}
    trained(name, pair, output, **options)


def fully_shard(pair: Path, output: Path) -> None:
    """torch's own `fully_shard` on student and teacher, against the same global batch in one process: tied
    and untied head."""
    for family in ("pair", "untied"):
        _fully_shard(pair.parent / family, output, f"fully_shard_{family}")


def _fully_shard(pair: Path, output: Path, name: str) -> None:
    from torch.distributed import fsdp

    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), world_size()
    inputs = _labeled_rows(pair, 2 * world)
    load = AutoModelForCausalLM.from_pretrained
    whole, teacher, sharded, frozen = (
        add_head_function(load(pair / which)) for which in ("student", "teacher", "student", "teacher")
    )
    frozen.requires_grad_(False)
    for model in (sharded, frozen):
        for layer in model.model.layers:
            fsdp.fully_shard(layer)
        fsdp.fully_shard(model, reshard_after_forward=True)
    count = len(token_batch(inputs).labels)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9) for model in (whole, sharded)]
    gradient_difference = loss_difference = 0.0
    for step in range(4):
        expected = _hpd_loss(whole, teacher, inputs, step, 1.0 / count)
        part = {key: value[2 * rank : 2 * rank + 2] for key, value in inputs.items()}
        loss = _hpd_loss(sharded, frozen, part, step, world / count)  # FSDP averages over processes
        expected.backward()
        loss.backward()
        total = loss.detach().clone() / world
        distributed.all_reduce(total)
        loss_difference = max(loss_difference, abs(float(total - expected)))
        for ours, theirs in zip(sharded.parameters(), whole.parameters(), strict=True):
            apart = float((ours.grad.full_tensor() - theirs.grad).abs().max())
            gradient_difference = max(gradient_difference, apart)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    final = torch.cat([p.detach().full_tensor().flatten().double() for p in sharded.parameters()])
    reference = torch.cat([p.detach().flatten().double() for p in whole.parameters()])
    held = sum(p.to_local().numel() for p in frozen.parameters())
    report(
        name,
        output,
        final,
        [],
        gradients=gradient_difference,
        losses=loss_difference,
        final=float((final - reference).abs().max()),
        teacher_share=held / sum(p.numel() for p in teacher.parameters()),
    )


def _labeled_rows(pair: Path, count: int) -> dict[str, torch.Tensor]:
    """Padded rows, of which the second process has one label at most."""
    tokenizer = AutoTokenizer.from_pretrained(pair / "student")
    texts = [f"{row['prompt']}{row['completion']}" for row in rows(count)]
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
    labels[2:3, :-1] = labels[3:4] = -100
    return {**{key: encoded[key] for key in ("input_ids", "attention_mask")}, "labels": labels}


def _hpd_loss(student, teacher, inputs: dict[str, torch.Tensor], step: int, scale: float) -> torch.Tensor:
    """HPD's, through the head function of a student that may be sharded."""
    terms, batch = name_terms(choose_terms("hpd", {}, ())), token_batch(inputs)
    known = scores_of(teacher, inputs, batch.index)
    numbers = uniforms(batch.keys, seed=0, step=step, count=max(term.support.num_uniforms for term in terms))
    return student(
        **model_inputs(inputs),
        label_index=batch.index,
        head_function=lambda scores: (
            reweighted_nll(scores, known, batch.labels, terms, uniforms=numbers, scale=scale).loss
        ),
    )


def refusals(pair: Path, output: Path) -> None:
    """A recipe that asks for FSDP where accelerate would run DDP."""
    try:
        make_trainer(pair, output / "refused", fsdp=True, fsdp_config={"version": 2})
    except ValueError as error:
        report("refusals", output, torch.zeros(1), [], message=str(error))
    else:
        raise AssertionError("FSDP was asked for, DDP chosen, and nobody said so")


def run_checks(checks: Mapping[str, Callable[[Path, Path], None]]) -> None:
    """Those that the command line names."""
    models, out, *names = sys.argv[1:]
    torch.set_num_threads(1)
    with leaving_processes():
        for check in names:
            checks[check](Path(models), Path(out))


CHECKS = {
    function.__name__: function
    for function in (
        plain,
        accumulated,
        uneven,
        rollouts,
        own_rows,
        two_tokenizers,
        written_in_bytes,
        low_precision,
        self_teacher,
        averaged,
        cached,
        resumed,
        straight,
        fsdp2,
        fsdp2_averaged,
        fsdp2_two_tokenizers,
        fully_shard,
        refusals,
    )
}


if __name__ == "__main__":
    run_checks(CHECKS)
