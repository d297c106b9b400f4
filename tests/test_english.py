"""American spelling and plain words, in what people read: pages, docstrings, help and messages."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_ISE = (
    r"(?:amorti|categori|emphasi|finali|factori|generali|initiali|lineari|locali|maximi|memori|minimi|normali"
    r"|optimi|organi|parametri|penali|quanti|recogni|regulari|seriali|speciali|stabili|standardi|summari"
    r"|synchroni|tokeni|utili|vectori|visuali)s(?:e|ed|er|ers|es|ing|ation|ations|able)"
)
_OUR = r"(?:behavi|col|fav|hon|lab|neighb)our(?:s|ed|ing|ite)?"
_OTHERS = (
    r"distils?|learnt|spelt|misspelt|labelled|labelling|modelled|modelling|travelled|travelling|cent(?:re|res|red)|grey"
    r"|licence|programme|artefact|catalogue|judgement|analyse[ds]?|whilst"
)
# What a native reader stumbles over, and what to write instead.
_PLAIN = {
    r"dear(?:er|est)?": "slow, expensive",
    r"anew": "again",
    r"without a word": "silently",
    r"cannot be forged": "what was tried against it",
}
# The same in sentences: of pages, help texts and what an error says; comments are not read by everybody.
_SENTENCES = {
    r"(?<![Tt]here )\b(?:is|are) no (?![a-z]+ (?:left|more)\b|longer\b|more\b)": "is not a",
    r"\b[Bb]eside\b": "next to, with, compared with",
    r"\b[Gg](?:o|oes|oing) on\b": "resume, continue",
    r"\b(?:has|have) not\b(?! (?:been|yet|run|converged|seen|found|reached|shown))": "does not have",
    r"\bof one's own\b": "of your own",
    r"\d %": "84%, without a space",
}
BRITISH = re.compile(rf"(?<![A-Za-z])(?:{_ISE}|{_OUR}|{_OTHERS})(?![a-z])", re.IGNORECASE)
PLAIN = re.compile(rf"(?<![A-Za-z])(?:{'|'.join(_PLAIN)})(?![A-Za-z])", re.IGNORECASE)
SENTENCES = re.compile("|".join(_SENTENCES))
# Written at the same time as this list was; each goes from here when it has been read for it.
_UNREAD = ("docs/performance.md", "docs/any-teacher.md", "docs/compatibility.md")
READ = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *(path for path in ROOT.glob("docs/*/**/*.md") if path.parts[-3] != "results"),
    *ROOT.glob("recipes/**/*.md"),
    *ROOT.glob("recipes/**/*.yaml"),
    *ROOT.glob("examples/**/*.*"),
    *ROOT.glob("hpd/**/*.py"),
    ROOT / "Makefile",
]


@pytest.mark.parametrize("path", READ, ids=lambda path: str(path.relative_to(ROOT)))
def test_words(path):
    text = path.read_text(encoding="utf-8")
    found = [match[0] for pattern in (BRITISH, PLAIN) for match in pattern.finditer(text)]
    assert found == []


PAGES = [
    path
    for path in READ
    if path.suffix == ".md" and path.name != "CHANGELOG.md" and str(path.relative_to(ROOT)) not in _UNREAD
]


def sentences_of(page: str) -> str:
    """A page without its listings, code and addresses."""
    plain = re.sub(r"^ *```.*?^ *```|^ {4}.*?$", "", page, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`|\]\([^)]*\)|<!--.*?-->", "", plain)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sentences_of_a_page(path):
    text = sentences_of(path.read_text(encoding="utf-8"))
    assert [text[m.start() - 30 : m.end() + 30] for m in SENTENCES.finditer(text)] == []


SAID = ("CheckResult", "warn", "warning", "Verdict", "print", "say")
"""Calls whose texts people read, besides what is raised."""


def messages(source: str) -> list[str]:
    """The texts of a module's errors, warnings and lines in a terminal."""
    found = []
    for node in ast.walk(ast.parse(source)):
        name = getattr(getattr(node, "func", None), "id", getattr(getattr(node, "func", None), "attr", ""))
        if isinstance(node, ast.Raise) or name in SAID:
            found += [
                n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)
            ]
    return found


def test_sentences_of_messages():
    said = [(path, text) for path in ROOT.glob("hpd/**/*.py") for text in messages(path.read_text("utf-8"))]
    assert len(said) > 1000
    assert [(path.name, text) for path, text in said if SENTENCES.search(text)] == []
    assert SENTENCES.search(messages('raise ValueError(f"{x} is no token.")')[0])


@pytest.mark.parametrize(
    "text", ["a loss that is no distance", "84 %", "it goes on", "beside it", "it has not one"]
)
def test_the_list_of_sentences_finds_what_it_is_for(text):
    assert SENTENCES.search(text)
    assert not SENTENCES.search(sentences_of(f"`{text}`"))


@pytest.mark.parametrize("text", ["there is no GPU", "84%", "besides", "it has not been run", "no longer"])
def test_the_list_of_sentences_leaves_others_alone(text):
    assert not SENTENCES.search(text)


@pytest.mark.parametrize("word", ["optimiser", "Initialisation", "row_as_learnt", "colours", "dearest"])
def test_the_list_finds_what_it_is_for(word):
    assert BRITISH.search(word) or PLAIN.search(word)


@pytest.mark.parametrize("word", ["optimizer", "precise", "noise", "raised", "exercise", "endear", "wise"])
def test_the_list_leaves_other_words_alone(word):
    assert not BRITISH.search(word)
    assert not PLAIN.search(word)
