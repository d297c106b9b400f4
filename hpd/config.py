"""The recipe: everything that a run is, as one tree of frozen dataclasses. Loading, overrides and cross-checks."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from hpd.checks import check_answers_anything, check_generate, check_teacher, check_train_values
from hpd.guards import GuardsConfig, Thresholds
from hpd.methods import choose_terms, name_terms
from hpd.policy_gradient import StrategyConfig
from hpd.prefixes import Prefixes, ReplayConfig, RolloutConfig
from hpd.recipe_file import read_yaml, shorten
from hpd.regime import Regime, choose_regime
from hpd.secrets import check_no_secrets, redact_tree
from hpd.stage_config import DpoStageConfig, StageConfig
from hpd.terms import TermConfig

__all__ = [
    "CacheConfig", "DataConfig", "EvalConfig", "GenerateConfig", "LoraConfig", "ModelConfig", "Recipe", "TeacherConfig",
    "check_tree",
    "load_recipe", "resolve",
]  # fmt: skip

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
DType = Literal["auto", "float32", "bfloat16", "float16"]


def _model_shorthand(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


def _teacher_shorthand(value: Any) -> Any:
    if isinstance(value, str):
        return {"type": "self"} if value == "self" else {"type": "model", "model": value}
    return value


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A causal language model and how to load it."""

    __pydantic_config__ = _STRICT

    model: str
    """Hub id or local folder, anything that `AutoModelForCausalLM.from_pretrained` takes."""
    dtype: DType = "float32"
    """Dtype of the weights. The student's master weights belong in float32; mixed precision is `train: {bf16: true}`."""
    init: Literal["pretrained", "random"] = "pretrained"
    """random: only the configuration is read, the weights start from the run's seed."""
    tokenizer: str | None = None
    """Tokenizer's Hub id or folder; null: the model's own."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    attn_implementation: str | None = None
    """sdpa, flash_attention_2, ...; null: what transformers chooses."""
    trust_remote_code: bool = False
    """Run code that the model's repository brings. Off unless you have read it."""
    allow_pickle: bool = False
    """Take weights from a pickle (pytorch_model.bin) where there are no safetensors. Off unless you trust who wrote it."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Where the teacher's distribution comes from."""

    __pydantic_config__ = _STRICT

    type: Literal["model", "self", "cached", "server", "mixture", "routed"] = "model"
    """model: a frozen model beside the student. self: the student as it was before training (adapter off, or a copy). cached:
    what `hpd cache` wrote. server: a model that answers over HTTP. mixture: a weighted mixture of teachers. routed: each row
    has one of several teachers."""
    model: str | None = None
    """Hub id or local folder; required by type model. Type cached: may stay, the cache must then be of this model. Type server:
    the name that the server knows the model by."""
    path: str | None = None
    """Folder of a cache (type cached); null: cache.path."""
    teachers: Mapping[str, Annotated[TeacherConfig, BeforeValidator(_teacher_shorthand)]] = field(default_factory=dict)
    """Teachers by name (types mixture and routed); a string is a model's path."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Share of each teacher in a mixture, > 0; divided by their sum."""
    column: str | None = None
    """Column of the dataset that names each row's teacher (type routed)."""
    dtype: DType = "auto"
    """auto: as saved. The teacher is never trained, so bfloat16 is enough on a GPU. Protocol hpd: of hidden states and head."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Load the teacher's weights quantised by bitsandbytes (extra `quantization`)."""
    tokenizer: str | None = None
    """Tokenizer to compare the student's with; null: the teacher's own."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    attn_implementation: str | None = None
    """sdpa, flash_attention_2, ...; null: what transformers chooses."""
    trust_remote_code: bool = False
    """Run code that the model's repository brings. Off unless you have read it."""
    allow_pickle: bool = False
    """Take weights from a pickle (pytorch_model.bin) where there are no safetensors. Off unless you trust who wrote it."""
    url: str | None = None
    """Type server: its base address, such as http://127.0.0.1:8765."""
    protocol: Literal["openai", "echo", "sglang", "hpd"] | None = None
    """Type server; null: openai. openai: /v1/completions with prompt_logprobs (vLLM). echo: the same with echo and
    return_tokens_as_token_ids. sglang: /generate. hpd: a server that `hpd serve-teacher` runs, exact for every method."""
    api_key_env: str | None = None
    """Type server: name of the environment variable that holds the key. Never the key: recipes are written to run folders."""
    top_k: int | None = None
    """Protocols openai, echo, sglang: likeliest tokens asked for, >= 1; null: 20."""
    tail: Literal["exact", "uniform"] = "exact"
    """Protocols openai, echo, sglang. exact: a method that reads other tokens than label and top_k is an error. uniform: those
    tokens share the rest of the teacher's mass evenly, an approximation."""
    concurrency: int = 4
    """Type server: requests at once, >= 1."""
    timeout_seconds: float = 120.0
    """Type server: longest wait for one answer, > 0."""
    wait_seconds: float = 600.0
    """Type server: how long a failed request is tried again before training saves a checkpoint and stops, >= 0."""

    @property
    def title(self) -> str:
        """What a person would call it."""
        if self.type == "self":
            return "itself (self-distillation)"
        if self.type == "cached":
            return f"the cache {self.path}"
        if self.teachers:
            return f"a {'mixture' if self.type == 'mixture' else 'choice'} of {', '.join(self.teachers)}"
        return str(self.model) if self.url is None else f"{self.model or 'a model'} at {self.url}"


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What `hpd cache` writes; training reads it through `teacher: {type: cached}`."""

    __pydantic_config__ = _STRICT

    path: str
    """Folder."""
    kind: Literal["hidden", "top_k"] = "hidden"
    """hidden: last hidden state and log-normaliser of each label position, and the head once: serves everything.
    top_k: the likeliest tokens and the label: smaller where the hidden state is wide, approximate beside them."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """Numbers on disk. auto: the dtype that the teacher computes in, without loss (top_k: float32). int8 (hidden only): one
    scale per position."""
    top_k: int | None = None
    """Tokens per position, required by kind top_k."""
    shard_bytes: int = 256 * 2**20
    """Size of a file; also what is lost at most when writing is killed."""

    def __post_init__(self) -> None:
        if (self.kind == "top_k") != (self.top_k is not None) or (self.top_k is not None and self.top_k < 1):
            raise ValueError("cache.top_k is the number of tokens of kind top_k, >= 1: set it there, and only there")
        if self.kind == "top_k" and self.dtype == "int8":
            raise ValueError("cache.dtype int8 is for hidden states: choose float16, bfloat16 or float32 for top_k")
        if self.shard_bytes < 1:
            raise ValueError("cache.shard_bytes must be >= 1")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The dataset whose completions are the prefixes."""

    __pydantic_config__ = _STRICT

    path: str
    """Local .jsonl, .json, .csv or .parquet file (also .gz), a folder of them, or a Hub dataset id."""
    name: str | None = None
    """Configuration of a Hub dataset."""
    split: str = "train"
    """Split to train on; slices such as train[:1%] work."""
    validation: float | str | None = None
    """A share of the rows held out, in (0, 1); or a file; or the name of another split; null: none."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Rename columns to what TRL expects, such as {prompt: question, completion: answer}."""
    format: Literal["auto", "chat", "plain"] = "auto"
    """chat: text prompts and completions become user and assistant messages (the student's chat template is applied).
    plain: text as it is. auto: as the rows are."""
    labels: Literal["completion", "assistant", "last_turn", "all"] = "completion"
    """Which tokens are learnt. completion: the completion column (all text where there is none); assistant: every assistant
    turn of `messages`; last_turn: only the last; all: prompt too."""
    system_prompt: str | None = None
    """System message put before each conversation that has none."""
    limit: int | None = None
    """Use only the first n rows."""
    streaming: bool = False
    """Read rows as training needs them instead of preparing all at start; needs train.max_steps."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A LoRA adapter on the student, as peft's LoraConfig names it."""

    __pydantic_config__ = _STRICT

    r: int = 16
    """Rank."""
    lora_alpha: int = 32
    """Scaling numerator: the update is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input, in [0, 1)."""
    target_modules: str | list[str] = "all-linear"
    """Module names, or all-linear (every linear layer but the head). Naming lm_head puts an adapter on the head."""
    modules_to_save: list[str] | None = None
    """Modules trained in full beside the adapter."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """A task that teacher and student are given before and after training, and the student while it trains."""

    __pydantic_config__ = _STRICT

    task: str = "exact-match"
    """A name of TASKS (docs/evaluation.md), or module:factory for your own."""
    data: str = ""
    """Its file, or a folder with one subfolder per task; empty: its data set on the Hub."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The task's own options, such as {tolerance: 0.02}; judge.NAME for a judge's."""
    limit: int | None = None
    """First n problems only."""
    limit_seed: int | None = None
    """Draw the n problems with this seed instead; the same ones each time."""
    every: int | Literal["epoch"] | None = None
    """Also in training: every n optimiser steps, or after each epoch. Logs eval_TASK_METRIC, as in eval_gsm8k_accuracy, which
    train.metric_for_best_model can name."""
    preset: Literal["greedy", "paper"] | None = None
    """greedy, or paper: temperature 0.7, top-p 0.95, several samples; null: as the task says, else greedy."""
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


def _one_or_many(value: Any) -> Any:
    return () if value is None else (value,) if isinstance(value, Mapping) else value


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Completions that a model writes for the prompts of `data` (`hpd generate`)."""

    __pydantic_config__ = _STRICT

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
    """Which draws."""
    batch_size: int = 16
    """Prompts per forward; requests at once for a server have teacher.concurrency."""
    truncated: Literal["drop", "keep"] = "drop"
    """Completions that max_new_tokens cut. Kept ones are marked (finish_reason: length); training would end them early."""
    filter: Literal["none", "correct"] = "none"
    """correct: keep completions whose final answer is that of the dataset."""
    reference: str | None = None
    """Column with the right answer, for filter: correct; null: the dataset's completion (or last turn)."""


def _strategy_shorthand(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run: one student, one teacher, prefixes and a list of terms; or several such stages, one after the other."""

    __pydantic_config__ = _STRICT

    student: Annotated[ModelConfig, BeforeValidator(_model_shorthand)]
    """The model that learns; a string is its path."""
    teacher: Annotated[TeacherConfig, BeforeValidator(_teacher_shorthand)]
    """The model that is learnt from; a string is its path, or "self"."""
    data: DataConfig
    """What both read."""
    method: str | None = None
    """A name of METHODS (`hpd methods`); null with `terms`, else hpd."""
    method_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of the method, such as {reinforce: false, draw_share: 0.5}."""
    terms: tuple[TermConfig, ...] = ()
    """A weighted sum of objectives instead of a method."""
    prefixes: Prefixes | None = None
    """Shares of dataset and student text; null: the method's own, which is the dataset alone for most."""
    rollouts: RolloutConfig | None = None
    """How the student writes, where it does."""
    strategy: Annotated[StrategyConfig | None, BeforeValidator(_strategy_shorthand)] = None
    """direct or policy_gradient, with its settings; a string is its type; null: the method's own."""
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    """Signs of trouble that warn, or stop and save."""
    stages: tuple[StageConfig, ...] = ()
    """Stages of the run, each a change of this recipe that starts from the student that the one before left."""
    lora: LoraConfig | None = None
    """Train an adapter instead of all weights."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Any field of DistillConfig (that is TRL's SFTConfig and transformers' TrainingArguments), such as learning_rate."""
    eval: Annotated[tuple[EvalConfig, ...], BeforeValidator(_one_or_many)] = ()
    """What to run before and after training, and on the way: one task, or a list of them."""
    generate: GenerateConfig | None = None
    """What `hpd generate` writes; null: its defaults."""
    output_dir: str = "runs/hpd"
    """The run folder: recipe, metrics, checkpoints, the trained student."""
    cache: CacheConfig | None = None
    """What `hpd cache` writes of this recipe."""

    def choose_terms(self):
        """The terms of the loss, as configured; checked."""
        return choose_terms(self._method, self.method_kwargs, self.terms)

    @property
    def _method(self) -> str | None:
        return self.method if self.method or self.terms else "hpd"

    def choose_regime(self) -> Regime:
        """Prefixes, rollouts and strategy, the method's own where the recipe has none; checked."""
        return choose_regime(self._method, name_terms(self.choose_terms()), self.prefixes, self.rollouts, self.strategy)


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        source: YAML file, or the tree itself.
        overrides: `a.b=c` assignments; the value is read as YAML.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: not YAML, unknown key (with the nearest valid one), wrong type, or choices that do not fit together.
    """
    tree = dict(source) if isinstance(source, Mapping) else read_yaml(Path(source))
    for override in overrides:
        _override(tree, override)
    return check_tree(tree)


def check_tree(tree: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data, checked. Raises ValueError as `load_recipe`."""
    try:
        recipe = TypeAdapter(Recipe).validate_python(tree)
    except ValidationError as error:
        raise ValueError(_explain(error)) from None
    check_no_secrets(resolve(recipe, redacted=False))
    if recipe.teacher.type == "cached" and recipe.teacher.path is None and recipe.cache is not None:
        recipe = dataclasses.replace(recipe, teacher=dataclasses.replace(recipe.teacher, path=recipe.cache.path))
    _cross_check(recipe)
    return recipe


def resolve(recipe: Recipe, redacted: bool = True) -> dict[str, Any]:
    """The recipe with every default written out, as plain data for YAML.

    Args:
        redacted: replace secrets, which a recipe that was built in Python may hold (`load_recipe` refuses them).
    """
    tree = TypeAdapter(Recipe).dump_python(recipe, mode="json")
    return redact_tree(tree) if redacted else tree


def _override(tree: dict[str, Any], text: str) -> None:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise ValueError(f"An override is written a.b=c, got {text!r}.")
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        if isinstance(child, list):
            raise ValueError(f"{key!r}: {parent} is a list in the recipe; change its entries there.")
        if isinstance(child, str) and parent in ("student", "teacher"):
            child = (_model_shorthand if parent == "student" else _teacher_shorthand)(child)
        node[parent] = dict(child) if isinstance(child, Mapping) else {}
        node = node[parent]
    try:
        node[last] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        node[last] = value
    except RecursionError:
        raise ValueError(f"The value of {key} is nested too deeply.") from None


def _explain(error: ValidationError) -> str:
    """One line per mistake: path, what was given, what is allowed."""
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"] if not str(part).startswith("function-"))
        if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            allowed = _keys_at(item["loc"][:-1])
            close = get_close_matches(str(item["loc"][-1]), allowed, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(allowed)}."
            lines.append(f"unknown key {path!r}; {hint}")
        elif item["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
            lines.append(f"{path!r} is missing")
        else:
            lines.append(f"{path!r}: {item['msg'][0].lower()}{item['msg'][1:]}, got {shorten(item['input'])}")
    return "The recipe is not valid: " + "; ".join(dict.fromkeys(lines))


def _keys_at(location: Sequence[int | str]) -> list[str]:
    classes = {
        "student": ModelConfig, "teacher": TeacherConfig, "data": DataConfig, "lora": LoraConfig,
        "eval": EvalConfig, "terms": TermConfig, "replay": ReplayConfig, "prefixes": Prefixes, "rollouts": RolloutConfig,
        "strategy": StrategyConfig, "guards": GuardsConfig, "dpo": DpoStageConfig, "stages": StageConfig,
        "generate": GenerateConfig, "cache": CacheConfig,
    }  # fmt: skip
    if "guards" in location and location[-1] != "guards":
        return [f.name for f in dataclasses.fields(Thresholds)]
    owner = next((classes[part] for part in location if part in classes), Recipe)
    return [f.name for f in dataclasses.fields(owner)]


def _cross_check(recipe: Recipe) -> None:
    """Choices that cannot go together, found before anything is loaded."""
    recipe.choose_terms()
    regime = recipe.choose_regime()
    if recipe.stages:
        from hpd.stages import stage_recipes

        stage_recipes(recipe)
    data = recipe.data
    named = {"student.model": recipe.student.model, "data.path": data.path, "output_dir": recipe.output_dir}
    if empty := next((name for name, value in named.items() if not value.strip()), None):
        raise ValueError(f"{empty} is empty: give a path, or (models and data) a Hub id.")
    check_teacher(recipe.teacher, recipe)
    if regime.prefixes.on_policy or regime.strategy.type == "policy_gradient":
        check_answers_anything(recipe.teacher)
    if data.streaming and isinstance(data.validation, float):
        raise ValueError("A stream has no known length to take a share of: give data.validation a file or a split.")
    if isinstance(data.validation, float) and not 0.0 < data.validation < 1.0:
        raise ValueError(f"data.validation as a share must be in (0, 1), got {data.validation}.")
    if data.limit is not None and data.limit < 1:
        raise ValueError(f"data.limit must be >= 1, got {data.limit}.")
    if recipe.lora and recipe.lora.r < 1:
        raise ValueError(f"lora.r must be >= 1, got {recipe.lora.r}.")
    if recipe.lora and not 0.0 <= recipe.lora.lora_dropout < 1.0:
        raise ValueError(f"lora.lora_dropout must be in [0, 1), got {recipe.lora.lora_dropout}.")
    _check_evals(recipe.eval)
    if recipe.generate:
        check_generate(recipe.generate)
    if os.path.isfile(recipe.output_dir):
        raise ValueError(f"output_dir {recipe.output_dir!r} is a file: give a folder.")


def _check_evals(evals: Sequence[EvalConfig]) -> None:
    for config in evals:
        if config.task == "exact-match" and not config.data:
            raise ValueError("eval.data is missing: give a file with prompts and answers, or remove eval.")
        if isinstance(config.every, int) and config.every < 1:
            raise ValueError(f"eval.every must be 1 or more steps, or epoch, got {config.every}.")
    names = [config.task for config in evals]
    if len(set(names)) < len(names):
        raise ValueError("eval names a task twice: their metrics would have one name.")


def train_arguments(recipe: Recipe, **forced: Any) -> Any:
    """`DistillConfig` from `train:`, every value checked against its field.

    Raises:
        ValueError: unknown field (with the nearest one) or a value of the wrong type.
    """
    # transformers and TRL take seconds to import; the help and the recipe's own checks do without.
    from typing import get_type_hints

    from hpd.trainer import DistillConfig

    hints = get_type_hints(DistillConfig, include_extras=False)
    names = [f.name for f in dataclasses.fields(DistillConfig) if f.init]
    values: dict[str, Any] = {}
    for key, value in recipe.train.items():
        if key not in names:
            close = get_close_matches(key, names, n=1)
            hint = (
                f"; did you mean {close[0]!r}?"
                if close
                else ": a field of TRL's SFTConfig, such as learning_rate or max_steps."
            )
            raise ValueError(f"unknown key 'train.{key}'{hint}")
        if key in forced:
            raise ValueError(f"train.{key} is set by the recipe's own keys; remove it from train.")
        try:
            values[key] = TypeAdapter(hints[key], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"train.{key}: {error.errors()[0]['msg']}, got {shorten(value)}") from None
    check_train_values(values)
    if recipe.data.streaming and values.get("max_steps", -1) <= 0:
        raise ValueError("data.streaming needs train.max_steps: a stream has no known length.")
    values.setdefault("max_length", 1024)
    values["assistant_only_loss"] = recipe.data.labels == "assistant"
    values["completion_only_loss"] = None if recipe.data.labels != "all" else False
    try:
        return DistillConfig(output_dir=recipe.output_dir, **{**values, **forced})
    except (TypeError, ValueError, ImportError, NotImplementedError, RuntimeError) as error:
        # transformers, TRL and accelerate check the fields against each other and the machine, each with its own error.
        raise ValueError(f"train: {' '.join(str(error).split())}") from None
