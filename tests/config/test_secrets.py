"""What counts as a secret: names of fields, shapes of keys, addresses, variables; and what does not."""

import time

import pytest

from hpd.config.secrets import check_no_secrets, redact, redact_tree

SHAPES = [
    "AIza" + "Sy" * 17,
    "gsk_" + "a1B2" * 10,
    "nvapi-" + "a1B2-_" * 10,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJjYW5hcnkifQ.c2lnbmF0dXJl",
    "AKIA" + "A1" * 8,
    "ASIA" + "B2" * 8,
    "sk-proj-" + "a1" * 20,
    "sk-ant-api03-" + "a1" * 20,
    "sk_live_" + "a1" * 12,
    "hf_" + "a1" * 17,
    "ghp_" + "a1" * 18,
    "glpat-" + "a1" * 10,
    "xoxb-1234567890-abcdef",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIcanary\n-----END RSA PRIVATE KEY-----",
    "Bearer abcdef0123456789abcdef",
    "Basic dXNlcjpjYW5hcnk0NTY3",
]
ADDRESSES = [
    "https://user:canary@host/rows.jsonl",
    "https://user:can@ary@host/rows.jsonl",
    "postgres://user:canary@host/db",
    "https://host/rows?api_key=canary",
    "https://host/rows?a=1&access-token=canary",
    "https://host/rows?X-Amz-Credential=canary&X-Amz-Signature=canary",
    "https://account.blob/rows?sv=1&sig=canary",
    "https://host/rows?key=canary",
    "host/rows?password=canary",
    "https://host/#access_token=canary",
]
NAMES = [
    "authorization",
    "Authorization",
    "private_key",
    "pwd",
    "credentials",
    "x-api-key",
    "X-Api-Key",
    "apiKey",
    "clientSecret",
    "aws_secret_access_key",
    "db_password",
    "passphrase",
    "accessToken",
    "judge.api_key",
    "hub_token",
    "cookie",
]
ORDINARY = [
    {"eos_token": "<end>"},
    {"max_new_tokens": 7},
    {"pad_token_id": 7},
    {"api_key_env": "TEACHER_KEY", "key_env": "JUDGE_KEY", "token_env": "HPD_SERVE_TOKEN"},
    {"token": 5},
    {"key": "column", "keys": ["a", "b"]},
    {"tokenizer": "folder", "tokens": "text"},
    {"hub_token": None, "save_password": False, "password": ""},
    {"path": "hf://datasets/owner/name@main/rows.jsonl"},
    {"url": "https://host/rows?version=3&lang=en"},
    {"system": "Give basic multiplication-facts; bearer of ill-fated-good-and-bad-news."},
    {"path": "runs/task-averse-learning-rates-sweep"},
    {"author": "me", "secretary": "you", "monkey": "a", "keyboard": "b"},
]


@pytest.mark.parametrize("value", SHAPES + ADDRESSES)
def test_values_that_are_refused_and_hidden(value):
    for tree in ({"data": {"path": value}}, {"list": ["a", {"b": value}]}, {"data": {value: "x"}}):
        with pytest.raises(ValueError, match="run folders keep") as caught:
            check_no_secrets(tree)
        for text in (str(caught.value), redact(f"before {value} after"), str(redact_tree(tree))):
            assert value not in text
            assert "canary" not in text
    assert redact(f"before {value} after").startswith("before ")
    assert redact(f"before {value} after").endswith(" after")


def test_a_private_key_whose_end_is_cut_off_is_hidden_to_the_end():
    assert redact("before -----BEGIN EC PRIVATE KEY-----\nMHcCcanary\nAAAA") == "before ***"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["canary", 314159, ["a", "canary"], {"user": "a", "deep": ["canary"]}])
def test_fields_that_are_refused_and_hidden(name, value):
    tree = {"eval": {"options": {name: value}}}
    with pytest.raises(ValueError, match="is a secret") as caught:
        check_no_secrets(tree)
    for text in (str(caught.value), str(redact_tree(tree))):
        assert "canary" not in text
        assert "314159" not in text


@pytest.mark.parametrize("tree", ORDINARY)
def test_ordinary_fields_pass_unchanged(tree):
    check_no_secrets({"train": tree})
    assert redact_tree(tree) == tree


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "DB_PASSWORD",
        "DB_PASS",
        "DB_PWD",
        "PGPASSWORD",
        "KAGGLE_KEY",
        "MY_PRIVATE_KEY",
        "AZURE_STORAGE_CONNECTION_STRING",
        "TEACHER_API_KEY_2",
        "service_credentials",
    ],
)
def test_values_of_secret_variables_are_hidden(name, monkeypatch):
    monkeypatch.setenv(name, "wJalr/canary+K7MDENG\n")
    assert redact("refused wJalr/canary+K7MDENG here") == "refused *** here"
    with pytest.raises(ValueError, match="access key"):
        check_no_secrets({"data": {"path": "s3://wJalr/canary+K7MDENG/rows"}})


def test_folders_and_short_words_in_variables_are_no_secrets(monkeypatch, tmp_path):
    for name, value in {
        "GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path),
        "PWD": "/some/folder",
        "TOKENIZERS_PARALLELISM": "false-false",
        "USE_KEY": "true",
    }.items():
        monkeypatch.setenv(name, value)
    text = f"{tmp_path} /some/folder false-false true"
    assert redact(text) == text


@pytest.mark.parametrize("before", ["", "a", "eyJ-", "x-eyJshort_", "token=", "."])
def test_a_web_token_is_found_wherever_a_word_begins_in_its_run(before):
    found = redact(f"{before} {before}-eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2ln, then")
    assert "hbGci" not in found
    assert "c2ln" not in found
    assert found.endswith("***, then")


def test_long_runs_of_what_begins_a_web_token_are_read_once():
    began = time.process_time()
    for text in ("eyJ-" * 50_000, "eyJabcdefgh.-" * 15_000, "eyJ-" * 50_000 + ".eyJ"):
        assert redact(text) == text
    # Each is 0.05 s; once for each "eyJ" it was 50.
    assert time.process_time() - began < 3.0
