"""The cost of a run, counted while it trains, and a stop where an equal budget is spent."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hpd.estimate.cost import FlopsPerToken
from hpd.experiments.experiment import Budget
from hpd.files import write_json

__all__ = ["BudgetCallback"]

_STATE_KEY = "hpd_budget"


class BudgetCallback(TrainerCallback):
    """Counts tokens, FLOPs and seconds of training, keeps them in the trainer's state, and stops where the
    budget is spent.

    With a budget other than steps, learning rate and term schedules follow the share of the budget that is
    spent, so that they end where the run ends: `state.max_steps` is re-estimated after every step.

    Args:
        price: see `flops_per_token`.
        budget: None or type steps only count.
        file: gets what was spent when training ends, which is before anything says that the run is finished.
    """

    def __init__(self, price: FlopsPerToken, budget: Budget | None = None, file: Path | None = None):
        self._price = price
        self._budget = budget if budget is not None and budget.type != "steps" else None
        self._file = file
        self.spent = {
            "label_tokens": 0.0,
            "trained_tokens": 0.0,
            "rollout_tokens": 0.0,
            "flops": 0.0,
            "seconds": 0.0,
        }
        self._hooks: list[Any] = []
        self._started = self._before = 0.0
        self._ceiling = 0

    @property
    def complete(self) -> bool:
        """True if the budget was spent, or if only steps count."""
        return self._budget is None or self.spent[self._budget.type] >= self._budget.value

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, lr_scheduler: Any = None, **kwargs: Any
    ) -> None:
        self.spent |= state.stateful_callbacks.get(_STATE_KEY, {})
        self._before = self.spent["seconds"]
        self._started = time.perf_counter()
        self._ceiling = state.max_steps
        # peft calls its base model's forward past the hooks in training, and the base model itself in
        # generation.
        modules = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
        self._hooks = [module.register_forward_pre_hook(self._count, with_kwargs=True) for module in modules]
        if self._budget is not None and lr_scheduler is not None:
            inner = getattr(lr_scheduler, "scheduler", lr_scheduler)
            if not hasattr(inner, "lr_lambdas"):
                raise ValueError(
                    f"A budget of {self._budget.type} needs a schedule of transformers, not "
                    f"{type(inner).__name__}."
                )
            inner.lr_lambdas = [self._follow_budget(schedule) for schedule in inner.lr_lambdas]

    def _follow_budget(self, schedule: Any) -> Any:
        # The schedule is written in steps of the ceiling; position 0 is asked for before the first step.
        return lambda step: schedule(0 if step == 0 else self._share() * self._ceiling)

    def _share(self) -> float:
        assert self._budget is not None
        return min(self.spent[self._budget.type] / self._budget.value, 1.0)

    def _count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, torch.Tensor):
            return
        labels = kwargs.get("label_index")
        if labels is None:
            self.spent["rollout_tokens"] += ids.numel()
        elif module.training:
            self.spent["trained_tokens"] += ids.numel()
            self.spent["label_tokens"] += len(labels)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Before the scheduler's step, which reads the share.
        price = self._price
        spent = self.spent
        spent["flops"] = (
            price.backbone * spent["trained_tokens"]
            + price.head * spent["label_tokens"]
            + price.rollout * spent["rollout_tokens"]
        )
        spent["seconds"] = self._before + time.perf_counter() - self._started

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.stateful_callbacks[_STATE_KEY] = dict(self.spent)
        if self._budget is None:
            return
        if self.complete:
            control.should_training_stop = True
        else:
            # Two beyond: the Trainer stops at max_steps before it asks here whether the budget is spent.
            ahead = max(state.global_step + 2, round(state.global_step / max(self._share(), 1e-9)))
            state.max_steps = min(ahead, self._ceiling)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._file is not None:
            write_json(self._file, self.spent)
