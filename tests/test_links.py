"""Links of every page lead somewhere: to a file of the repository, and to a heading that it has."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    {
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *(
            p
            for name in ("recipes", "experiments", "examples", "tests")
            for p in ROOT.glob(f"{name}/**/*.md")
        ),
    }
)
NAMED = re.compile(r"\bdocs/[\w/-]+\.(?:md|json|png)\b")
"""A page that code, a recipe or a script names."""


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(page: Path) -> set[str]:
    """The names that GitHub and the site give to headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.add(f"{name}-1" if name in found else name)
    return found


def broken(page: Path, text: str) -> list[str]:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        is_page = file.suffix == ".md"
        if not file.exists() or (anchor and is_page and anchor not in anchors(file)):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page(page):
    assert broken(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text", ["[a](missing.md)", "[a](README.md#missing)", "![a](docs/images/missing.png)"]
)
def test_a_broken_link_is_found(text):
    assert len(broken(ROOT / "README.md", text)) == 1


def test_every_page_that_code_names_is_there():
    folders = ("hpd", "scripts", "benchmarks", "recipes", "experiments", "examples")
    files = [
        p for folder in folders for p in ROOT.glob(f"{folder}/**/*") if p.suffix in (".py", ".md", ".yaml")
    ]
    named = {(name, file) for file in files for name in NAMED.findall(file.read_text(encoding="utf-8"))}
    assert len(named) > 20
    missing = [f"{file.relative_to(ROOT)}: {name}" for name, file in named if not (ROOT / name).exists()]
    assert sorted(missing) == []


def test_every_page_of_the_plan_is_there_and_every_page_is_in_the_plan():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = set(re.findall(r"([\w/.-]+\.md)$", text.partition("\nnav:\n")[2], re.MULTILINE))
    assert [page for page in sorted(nav) if not (ROOT / page).is_file()] == []
    site = ROOT / "website"
    assert all((site / page).is_file() for page in nav)  # through the links that it holds
    written = {str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md") if "results/" not in str(p)}
    assert written - nav == set()
    moved = dict(re.findall(r"^ +(docs/[\w-]+\.md): (docs/[\w/-]+\.md)$", text, re.MULTILINE))
    assert len(moved) >= 12
    assert all(not (ROOT / old).exists() and (ROOT / new).is_file() for old, new in moved.items())
