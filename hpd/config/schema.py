"""The recipe: everything that a run is, as one tree of frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from hpd.config.data import DataConfig, data_shorthand
from hpd.config.guards import GuardsConfig, Level, Thresholds
from hpd.config.models import ModelConfig, TeacherConfig, model_shorthand, teacher_shorthand
from hpd.methods.fields import STRICT, check_fields
from hpd.methods.prefixes import Prefixes, RolloutConfig
from hpd.methods.regime import Regime, choose_regime
from hpd.methods.strategy import StrategyConfig
from hpd.methods.table import choose_terms, name_terms
from hpd.methods.terms import Term, TermConfig

__all__ = [
    "CacheConfig",
    "DataConfig",
    "DpoStageConfig",
    "EvalConfig",
    "GenerateConfig",
    "GuardsConfig",
    "Level",
    "LoraConfig",
    "Recipe",
    "StageConfig",
    "Thresholds",
]


def _one_or_many(value: Any) -> Any:
    if value is None:
        return ()
    return (value,) if isinstance(value, Mapping) else value


def _strategy_shorthand(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The cache that `hpd cache` writes; training reads it through `teacher: {type: cached}`."""

    __pydantic_config__ = STRICT

    path: str
    """Folder."""
    kind: Literal["hidden", "top_k", "sampled"] = "hidden"
    """hidden: last hidden state and log-normalizer of each label position, and the head once: serves
    everything.
    top_k: the likeliest tokens and the label: smaller where the hidden state is wide, approximate next to
    them.
    sampled: tokens drawn from the teacher, with weights, and the label: an unbiased forward KL in few
    bytes."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """Numbers on disk. auto: the dtype that the teacher computes in, without loss (top_k: float32, sampled:
    float16). int8 (hidden only): one scale per position."""
    top_k: int | None = None
    """Tokens per position, required by kind top_k."""
    draws: int | None = None
    """Tokens drawn per position, required by kind sampled."""
    seed: int = 0
    """Of the draws (kind sampled)."""
    shard_bytes: int = 256 * 2**20
    """Size of a file; also what is lost at most when writing is killed."""

    def __post_init__(self) -> None:
        check_fields(self, "cache", shard_bytes=(self.shard_bytes >= 1, ">= 1"))
        if (self.kind == "top_k") != (self.top_k is not None) or (self.top_k is not None and self.top_k < 1):
            raise ValueError(
                "cache.top_k is the number of tokens of kind top_k, >= 1: set it there, and only there."
            )
        if (self.kind == "sampled") != (self.draws is not None) or (
            self.draws is not None and self.draws < 1
        ):
            raise ValueError(
                "cache.draws is the number of tokens of kind sampled, >= 1: set it there, and only there."
            )
        if self.kind != "sampled" and self.seed:
            raise ValueError("cache.seed is for the draws of kind sampled: remove it.")
        if self.kind != "hidden" and self.dtype == "int8":
            raise ValueError(
                f"cache.dtype int8 is for hidden states: choose float16, bfloat16 or float32 for {self.kind}."
            )


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A LoRA adapter on the student, as peft's LoraConfig names it."""

    __pydantic_config__ = STRICT

    r: int = 16
    """Rank."""
    lora_alpha: int = 32
    """Scaling numerator: the update is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input, in [0, 1)."""
    target_modules: str | list[str] = "all-linear"
    """Module names, or all-linear (every linear layer but the head). Naming lm_head puts an adapter on the
    head."""
    modules_to_save: list[str] | None = None
    """Modules trained in full with the adapter."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "lora",
            r=(self.r >= 1, ">= 1"),
            lora_dropout=(0.0 <= self.lora_dropout < 1.0, "in [0, 1)"),
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """A task that teacher and student are given before and after training, and the student while it
    trains."""

    __pydantic_config__ = STRICT

    task: str = "exact-match"
    """A name of TASKS (docs/guides/evaluate.md), or module:factory for your own."""
    data: str = ""
    """Its file, or a folder with one subfolder per task; empty: its data set on the Hub."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The task's own options, such as {tolerance: 0.02}; judge.NAME for a judge's."""
    limit: int | None = None
    """First n problems only."""
    limit_seed: int | None = None
    """Draw the n problems with this seed instead; the same ones each time."""
    every: int | Literal["epoch"] | None = None
    """Also in training: every n optimizer steps, or after each epoch. Logs eval_TASK_METRIC, as in
    eval_gsm8k_accuracy, which train.metric_for_best_model can name."""
    preset: Literal["greedy", "paper"] | None = None
    """greedy, or paper: temperature 0.7, top-p 0.95, 10,240 tokens, several samples
    (docs/guides/evaluate.md); null: as the task says, else greedy."""
    num_samples: int | None = None
    """Answers per problem."""
    max_new_tokens: int | None = None
    """Longest answer, in tokens; null: as the task says, else 512."""
    batch_size: int = 32
    """Prompts generated at once."""
    temperature: float | None = None
    """0 is greedy."""
    top_p: float | None = None
    """Sampling: draw from the likeliest tokens with this mass."""
    seed: int = 0
    """Sampling: which draws."""
    system_prompt: str | None = None
    """Instead of the task's; empty: none."""
    few_shot: int = 0
    """Worked examples in a plain-text prompt; 0: none."""
    few_shot_data: str | None = None
    """Their file; null: the task's training file."""

    def __post_init__(self) -> None:
        check_fields(self, "eval")
        if self.task == "exact-match" and not self.data:
            raise ValueError(
                "eval.data is missing: exact-match has no data of its own; give it a file with prompts and "
                "answers (hpd eval: --data)."
            )
        if isinstance(self.every, int) and self.every < 1:
            raise ValueError(f"eval.every must be 1 or more steps, or epoch, got {self.every}.")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Completions that a model writes for the prompts of `data` (`hpd generate`)."""

    __pydantic_config__ = STRICT

    model: str | None = None
    """Hub id or folder of another writer; null: the recipe's teacher (type self: the student)."""
    output: str = "generated.jsonl"
    """The JSONL file that is written: prompt and completion, and where they come from."""
    samples: int = 1
    """Completions per prompt, >= 1."""
    temperature: float = 1.0
    """0 is greedy; above 0, tokens are drawn from softmax(logits / temperature)."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this mass, in (0, 1]."""
    top_k: int = 0
    """Keep this many likeliest tokens; 0 keeps all."""
    max_new_tokens: int = 512
    """Longest completion, in tokens."""
    seed: int = 0
    """Seed of the draws."""
    batch_size: int = 16
    """Prompts per forward; requests at once for a server have teacher.concurrency."""
    truncated: Literal["drop", "keep"] = "drop"
    """Completions that max_new_tokens cut. Kept ones are marked (finish_reason: length); training would end
    them early."""
    filter: Literal["none", "correct"] = "none"
    """correct: keep completions whose final answer is that of the dataset."""
    reference: str | None = None
    """Column with the right answer, for filter: correct; null: the dataset's completion (or last turn)."""
    logprobs: bool = False
    """Write token ids and the log-probability of each token drawn, for training on them later
    (prefixes.stored). The draws must be the writer's own, all of them: temperature 1, nothing cut off,
    truncated: keep."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            "generate",
            samples=(self.samples >= 1, ">= 1"),
            temperature=(self.temperature >= 0, ">= 0"),
            top_p=(0 < self.top_p <= 1, "in (0, 1]"),
            top_k=(self.top_k >= 0, ">= 0"),
            max_new_tokens=(self.max_new_tokens >= 1, ">= 1"),
            batch_size=(self.batch_size >= 1, ">= 1"),
            seed=(self.seed >= 0, ">= 0"),
        )
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                "generate.samples > 1 at temperature 0 would write the same completion again and again."
            )
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            raise ValueError("generate.top_p and top_k have no effect at temperature 0: remove them.")
        if self.logprobs and not self._keeps_all_plain_draws:
            raise ValueError(
                "generate.logprobs is for likelihood ratios, which hold for all of a model's own draws and "
                "for no selection or reshaping of them: set temperature: 1, top_p: 1, top_k: 0, truncated: "
                "keep and filter: none."
            )
        if self.reference is not None and self.filter == "none":
            raise ValueError("generate.reference has no effect without filter: correct.")
        if not self.output.endswith(".jsonl"):
            raise ValueError(f"generate.output must end with .jsonl, got {self.output!r}.")

    @property
    def _keeps_all_plain_draws(self) -> bool:
        plain = self.temperature == self.top_p == 1.0 and self.top_k == 0
        return plain and self.truncated == "keep" and self.filter == "none"


@dataclass(frozen=True, kw_only=True)
class DpoStageConfig:
    """A stage of direct preference optimization by TRL's DPOTrainer."""

    __pydantic_config__ = STRICT

    pairs: Literal["rollouts", "data"] = "rollouts"
    """rollouts: the dataset's completion is preferred to one that the student writes when the stage starts,
    as the stage's rollouts say; one cut at max_new_tokens makes no pair, since it would get an end token that
    it does not have.
    data: the rows have the columns prompt, chosen and rejected."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Fields of TRL's DPOConfig, such as beta or loss_type; those of `train` that DPOConfig has count too."""

    def __post_init__(self) -> None:
        check_fields(self, "dpo")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stage of a run: what it changes in the recipe around it. The student is what the stage before
    leaves."""

    __pydantic_config__ = STRICT

    name: str
    """Its folder inside output_dir."""
    repeat: int = 1
    """Run it n times, one after the other (name-1, name-2, ...)."""
    teacher: Any = None
    """Another teacher; "previous": the student that the stage before left, next to which only what follows
    labels has a gradient."""
    method: str | None = None
    """Another method; its own prefixes and strategy then count, unless given here."""
    method_kwargs: Mapping[str, Any] | None = None
    """Parameters of the method."""
    terms: tuple[Any, ...] | None = None
    """Terms instead of a method."""
    prefixes: Mapping[str, Any] | None = None
    """Other prefixes."""
    rollouts: Mapping[str, Any] | None = None
    """Changes of rollouts."""
    strategy: Any = None
    """Another strategy."""
    guards: Mapping[str, Any] | None = None
    """Changes of guards."""
    data: Mapping[str, Any] | None = None
    """Changes of data."""
    train: Mapping[str, Any] | None = None
    """Changes of train."""
    eval: Any = None
    """Changes of eval, or other tasks."""
    dpo: DpoStageConfig | None = None
    """Preference optimization instead of distillation."""

    def __post_init__(self) -> None:
        if self.repeat < 1:
            raise ValueError(f"stages: {self.name}: repeat must be >= 1, got {self.repeat}.")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run: one student, one teacher, prefixes and a list of terms; or several such stages, one after the
    other."""

    __pydantic_config__ = STRICT

    student: Annotated[
        ModelConfig, BeforeValidator(model_shorthand, json_schema_input_type=str | ModelConfig)
    ]
    """The model that learns; a string is its path."""
    teacher: Annotated[
        TeacherConfig, BeforeValidator(teacher_shorthand, json_schema_input_type=str | TeacherConfig)
    ]
    """The model that is learned from; a string is its path, or "self"."""
    data: Annotated[
        DataConfig, BeforeValidator(data_shorthand, json_schema_input_type=str | DataConfig | list[Any])
    ]
    """The rows that both read."""
    method: str | None = None
    """A name of METHODS (`hpd methods`); null with `terms`, else hpd."""
    method_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of the method, such as {reinforce: false, sample_fraction: 0.5}."""
    terms: tuple[TermConfig, ...] = ()
    """A weighted sum of objectives instead of a method."""
    prefixes: Prefixes | None = None
    """Shares of dataset and student text; null: the method's own, which is the dataset alone for most."""
    rollouts: RolloutConfig | None = None
    """Settings of the student's own writing."""
    strategy: Annotated[
        StrategyConfig | None,
        BeforeValidator(_strategy_shorthand, json_schema_input_type=str | StrategyConfig | None),
    ] = None
    """direct or policy_gradient, with its settings; a string is its type; null: the method's own."""
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    """Signs of trouble that warn, or stop and save."""
    stages: tuple[StageConfig, ...] = ()
    """Stages of the run, each a change of this recipe that starts from the student that the one before
    left."""
    lora: LoraConfig | None = None
    """Train an adapter instead of all weights."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Any field of DistillConfig (that is TRL's SFTConfig and transformers' TrainingArguments), such as
    learning_rate."""
    eval: Annotated[
        tuple[EvalConfig, ...],
        BeforeValidator(_one_or_many, json_schema_input_type=EvalConfig | list[EvalConfig] | None),
    ] = ()
    """Tasks to run before and after training, and on the way: one task, or a list of them."""
    generate: GenerateConfig | None = None
    """Settings of `hpd generate`; null: its defaults."""
    output_dir: str = "runs/hpd"
    """The run folder: recipe, metrics, checkpoints, the trained student."""
    cache: CacheConfig | None = None
    """Settings of `hpd cache`."""

    def __post_init__(self) -> None:
        if not self.student.model.strip():
            raise ValueError("student.model is empty: give a folder or a Hub id.")
        if not self.output_dir.strip():
            raise ValueError("output_dir is empty: give a folder.")
        names = [config.task for config in self.eval]
        if len(set(names)) < len(names):
            raise ValueError("eval names a task twice: their metrics would have one name.")

    def choose_terms(self) -> tuple[TermConfig | Term, ...]:
        """Return the terms of the loss, checked."""
        return choose_terms(self._method, self.method_kwargs, self.terms)

    @property
    def _method(self) -> str | None:
        return self.method if self.method or self.terms else "hpd"

    def choose_regime(self) -> Regime:
        """Return prefixes, rollouts and strategy, the method's own where the recipe has none; checked."""
        return choose_regime(
            self._method, name_terms(self.choose_terms()), self.prefixes, self.rollouts, self.strategy
        )
