"""Keys, addresses and values at the edge."""

import pytest

from hpd.http import check_url, clean_key, read_key, shown, without_key

GOOD = [
    "http://127.0.0.1:8765",
    "https://api.example.com/v1/",
    "http://[::1]:8000",
    "http://localhost",
    "https://host/openai/deployments/judge",
]
BAD = {
    "ftp://host": "base address",
    "host:8000": "base address",
    "": "base address",
    "http://": "base address",
    "http:///v1": "base address",
    "http://host:port": "not an address",
    "http://host:99999999": "not an address",
    "http://user:canary@host": "user name or password",
    "http://canary@host": "user name or password",
    "http://user:p@canary@host/v1": "user name or password",
    "user:canary@host": "user name or password",
    "http://user:canary": "not an address",
    "http://host/v1?api_key=canary": "without a query",
    "http://host/v1?": "without a query",
    "http://host/#canary": "without a query",
    "http://host\n": "control character",
    "http://ho st": "white space",
    "http://host\\@canary": "backslash",
    "http://host/\x1b[2Jcanary": "control character",
}


@pytest.mark.parametrize("url", GOOD)
def test_addresses(url):
    check_url(url, "teacher.url")


@pytest.mark.parametrize("url", BAD)
def test_addresses_that_are_refused_without_their_secret(url):
    with pytest.raises(ValueError, match=r"judge_url.*" + BAD[url]) as caught:
        check_url(url, "judge_url", "judge.key_env")
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("url", [None, 5, ["http://host"]])
def test_what_is_no_text_is_no_address(url):
    with pytest.raises(ValueError, match="base address"):
        check_url(url, "teacher.url")


@pytest.mark.parametrize("around", ["{}", "{}\n", " {}\r\n", "\t{}\t", "\ufeff{}", "{}\u00a0", "{}\u2028"])
def test_white_space_around_a_key_goes(around, monkeypatch):
    monkeypatch.setenv("SOME_KEY", around.format("sk-canary"))
    assert read_key("SOME_KEY") == "sk-canary"


@pytest.mark.parametrize(
    "key", ["sk-can\nary", "sk-can\rary", "can ary", "can\x1bary", "canaré", "can\u200bary"]
)
def test_what_a_header_cannot_carry_is_refused(key, monkeypatch):
    monkeypatch.setenv("SOME_KEY", key)
    with pytest.raises(ValueError, match=r"variable SOME_KEY holds a character .* at place \d+") as caught:
        read_key("SOME_KEY")
    assert key not in str(caught.value)
    assert str(caught.value).isprintable()


def test_no_key(monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    assert read_key(None) is None
    with pytest.raises(ValueError, match="key_env names the environment variable SOME_KEY, which is not set"):
        read_key("SOME_KEY", "judge.key_env")
    monkeypatch.setenv("SOME_KEY", " \n")
    with pytest.raises(ValueError, match="SOME_KEY is empty"):
        read_key("SOME_KEY")
    with pytest.raises(ValueError, match="the token is empty"):
        clean_key("", "the token")


def test_what_a_stranger_says_is_one_printable_line():
    assert shown("a\n\tb\x1b[2J\u202ec") == "a b\ufffd[2J\ufffdc"
    assert len(shown("x" * 10**6)) == 100


KEY = "sk-canary/4f1d9c0b7a+x"
TOLD = {
    "as it is": KEY,
    "json": r"sk-canary\/4f1d9c0b7a+x",
    "unicode escapes": r"sk-canary\u002f4f1d9c0b7a\u002bx",
    "an address": "sk-canary%2f4f1d9c0b7a%2bx",
    "an address twice": "sk-canary%252F4f1d9c0b7a%252Bx",
    "html": "sk-canary&#47;4f1d9c0b7a&#x2B;x",
    "capitals": KEY.upper(),
    "broken": "sk-canary/4f1d\r\n 9c0b7a+x",
    "invisible": "sk-canary\u200b/4f1d\u00ad9c0b7a+x",
    "utf-16 as latin-1": KEY.encode("utf-16-le").decode("latin-1"),
    "cut": KEY[:14],
    "its end": KEY[6:],
}


@pytest.mark.parametrize("name", TOLD)
def test_a_key_goes_in_whatever_form_a_server_repeats_it(name):
    left = without_key(f"wrong key <{TOLD[name]}>: {TOLD[name]}; ask again", KEY)
    letters = "".join(c for c in left.lower() if c.isascii() and c.isalnum())
    assert not any(piece in letters for piece in ("canary", "4f1d", "9c0b7a"))
    assert left.startswith("wrong key <[key]")
    assert left.endswith("; ask again")


def test_what_is_no_key_stays():
    assert without_key("try skcanar, 4f1d and the rest", KEY) == "try skcanar, 4f1d and the rest"
    assert without_key("pass word-1 word", "Word-1") == "pass [key] word"  # shorter than eight: all of it
    assert without_key("+ab+ is a+b", "+ab+") == "[key] is a+b"
    assert without_key("", KEY) == ""


@pytest.mark.parametrize("name", [KEY, "hf_canary0123456789", "A=B", "A\0B", "K\ud800", "", 5])
def test_a_key_in_the_place_of_its_variable_is_not_shown(name):
    with pytest.raises(ValueError, match="judge.key_env must name an environment variable") as caught:
        read_key(name, "judge.key_env")
    assert "canary" not in str(caught.value)
