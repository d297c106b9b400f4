"""American spelling and plain words, in what people read: pages, docstrings, help and messages."""

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
BRITISH = re.compile(rf"(?<![A-Za-z])(?:{_ISE}|{_OUR}|{_OTHERS})(?![a-z])", re.IGNORECASE)
PLAIN = re.compile(rf"(?<![A-Za-z])(?:{'|'.join(_PLAIN)})(?![A-Za-z])", re.IGNORECASE)
READ = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
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


@pytest.mark.parametrize("word", ["optimiser", "Initialisation", "row_as_learnt", "colours", "dearest"])
def test_the_list_finds_what_it_is_for(word):
    assert BRITISH.search(word) or PLAIN.search(word)


@pytest.mark.parametrize("word", ["optimizer", "precise", "noise", "raised", "exercise", "endear", "wise"])
def test_the_list_leaves_other_words_alone(word):
    assert not BRITISH.search(word)
    assert not PLAIN.search(word)
