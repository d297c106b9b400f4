"""A finished student on the Hub: whether it may go there, before training, and its files and card, after it.

transformers pushes the whole output folder while it trains; here the model, its tokenizer and the card of the
finished run go there, once, and none of the run's own files, which name folders of this machine.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from hpd.config.load import is_push_key, load_recipe
from hpd.config.schema import Recipe
from hpd.training.card import card_of

__all__ = ["Push", "PushFailed", "model_files", "opened", "push_asked", "push_run", "run_card"]

# What save_pretrained of models, adapters and tokenizers writes, and the code of a model of one's own.
_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"),
    *("adapter_config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "*.model", "*.tiktoken", "chat_template.jinja"),
    *("additional_chat_templates/*.jinja", "processor_config.json", "preprocessor_config.json", "*.py"),
)
_WITHOUT_EFFECT = ("hub_strategy", "hub_always_push")
_TOKEN = "put a token with write access into HF_TOKEN, or log in with `hf auth login`"


class Push(NamedTuple):
    """Where a model goes."""

    repo: str
    """owner/name; before `opened`, a name alone is one of the token's owner."""
    private: bool | None = None
    """Of a repository that is made for it; None: as the owner's account has it."""
    revision: str | None = None
    """The branch; None: main."""


class PushFailed(OSError):
    """The run is finished and whole, and its student is not on the Hub.

    Args:
        message: why, and how it gets there.
        summary: of the run.
    """

    def __init__(self, message: str, summary: Mapping[str, Any]):
        super().__init__(message)
        self.summary = dict(summary)


def push_asked(recipe: Recipe) -> Push | None:
    """Where `train.push_to_hub` sends the student; None: nowhere. The network is not asked.

    Raises:
        ValueError: a setting without effect, no token, a name that the Hub does not take, or an adapter whose
            base is a folder of this machine.
    """
    train = {key: value for key, value in recipe.train.items() if is_push_key(key) and value is not None}
    for key in _WITHOUT_EFFECT:
        if key in train and train[key] != "end":
            raise ValueError(
                f"train.{key} has no effect: hpd train pushes the finished student, once. Remove it."
            )
    if not train.get("push_to_hub"):
        if idle := [key for key in train if key != "push_to_hub" and key not in _WITHOUT_EFFECT]:
            raise ValueError(
                f"train.{idle[0]} has an effect with train.push_to_hub: true only: add that, or remove it."
            )
        return None
    push = Push(
        str(train.get("hub_model_id") or Path(recipe.output_dir).name),
        train.get("hub_private_repo"),
        train.get("hub_revision"),
    )
    _check(push, "train.push_to_hub")
    if recipe.lora is not None and (recipe.stages or (base := _local_base(recipe.student.model))):
        base = "an earlier stage's student" if recipe.stages else base
        raise ValueError(
            f"train.push_to_hub: the adapter's base ({base}) is on this machine only, so that nobody could "
            "load the adapter from the Hub. Remove it, and push the merged model after training: hpd export "
            f"{recipe.output_dir} --merge --output DIR --push-to-hub {push.repo}"
        )
    return push


def _check(push: Push, setting: str, token: str | None = None) -> None:
    """Refuse what can be seen without the network."""
    try:
        validate_repo_id(push.repo)
    except HFValidationError:
        raise ValueError(
            f"{setting}: {push.repo!r} is not a name for a model on the Hub: give owner/name or a name, of "
            "letters, digits, '-', '_' and '.', at most 96."
        ) from None
    if is_offline_mode():
        raise ValueError(f"{setting}: HF_HUB_OFFLINE is set, and the Hub is not asked. Unset it to push.")
    if (token or get_token()) is None:
        raise ValueError(f"{setting}: there is no token for the Hub: {_TOKEN}, or remove the setting.")


def opened(push: Push, setting: str = "train.push_to_hub", token: str | None = None) -> Push:
    """Make the repository where there is none, and ask whether the token may write there.

    Args:
        push: where to.
        setting: what messages name.
        token: of Python's `hub_token`; None: this machine's.

    Returns:
        The same, with the repository's full name.

    Raises:
        ValueError: it may not, the Hub cannot be reached, or as `push_asked`.
    """
    _check(push, setting, token)
    hub = HfApi(token=token)
    try:
        made = hub.create_repo(push.repo, private=push.private, exist_ok=True)
        hub.auth_check(made.repo_id, write=True)
        found = hub.model_info(made.repo_id).private if push.private is not None else None
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise ValueError(
            f"{setting}: {push.repo} cannot be written on the Hub ({_reason(error)}). Nothing was sent: "
            f"{_TOKEN}, choose another name, or remove the setting."
        ) from None
    if found != push.private:
        raise ValueError(
            f"{setting}: {made.repo_id} is on the Hub already, and is {'private' if found else 'public'}: "
            "change that there, choose another name, or do not ask for the opposite."
        )
    return push._replace(repo=made.repo_id)


def push_run(folder: Path, push: Push, card: str) -> str:
    """Send a model, its tokenizer and a card in one commit.

    Args:
        folder: with the model's files; others in it are not sent.
        push: from `opened`.
        card: README.md, in Markdown.

    Returns:
        The address of the repository.

    Raises:
        ValueError: there is no model in the folder, or an adapter of a base that is on this machine only.
        OSError: the Hub does not take it; nothing of it is there then.
    """
    additions = [CommitOperationAdd(name, folder / name) for name in model_files(folder, push)]
    additions.append(CommitOperationAdd("README.md", card.encode()))
    hub = HfApi()
    try:
        hub.create_commit(
            push.repo, additions, commit_message="Student trained with hpd", revision=push.revision
        )
    # Uploads of large files end in errors of several kinds, ValueError and RuntimeError among them.
    except (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise OSError(f"{push.repo} was not pushed to the Hub: {_reason(error)}.") from error
    return f"{hub.endpoint}/{push.repo}"


def model_files(folder: Path, push: Push) -> list[str]:
    """What of a folder is sent, sorted.

    Raises:
        ValueError: as `push_run`.
    """
    files = sorted(
        path.relative_to(folder).as_posix()
        for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*"))
        if path.is_file()
    )
    sent = [name for name in files if any(fnmatch.fnmatchcase(name, pattern) for pattern in _FILES)]
    if not {"config.json", "adapter_config.json"} & set(sent):
        raise ValueError(f"{folder} holds no model: neither config.json nor adapter_config.json.")
    if "config.json" not in sent and (base := _local_base(str(folder))) is not None:
        raise ValueError(
            f"The adapter's base ({base}) is on this machine only, so that nobody could load the adapter "
            f"from the Hub: push a merged model, hpd export {folder} --merge --output DIR --push-to-hub "
            f"{push.repo}"
        )
    return sent


def run_card(run: Path, repo: str, merged: bool = False) -> str:
    """The card of a finished run under its name on the Hub.

    Args:
        run: its folder.
        repo: owner/name.
        merged: the model is the run's adapter, merged into its base.

    Raises:
        ValueError: not the folder of a finished run.
    """
    recipe_file, summary_file = run / "recipe.yaml", run / "summary.json"
    if not (recipe_file.is_file() and summary_file.is_file()):
        raise ValueError(
            f"{run} is not the folder of a finished run, of which the card on the Hub tells: give one that "
            "hpd train left."
        )
    text = recipe_file.read_text(encoding="utf-8")
    recipe = load_recipe(recipe_file)
    card = card_of(recipe, repo, json.loads(summary_file.read_text(encoding="utf-8")), text)
    return replace(card, adapter=False).text() if merged else card.text()


def _local_base(model: str) -> str | None:
    """The folder of the base of an adapter on `model`; None: the Hub has it."""
    adapter = Path(model) / "adapter_config.json"
    if adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
        return base if Path(base).exists() or os.path.isabs(base) else None
    return model if Path(model).exists() else None


def _reason(error: BaseException) -> str:
    """What the Hub said, or what kept it from being asked, in one line."""
    while error.__cause__ is not None and isinstance(error, RuntimeError):
        error = error.__cause__  # the upload's own says only of which file
    response = getattr(error, "response", None)
    said = getattr(error, "server_message", None) or str(error).split("\n")[0]
    text = " ".join(str(said).split()).rstrip(".") or type(error).__name__
    return f"{response.status_code}: {text}" if response is not None else text
