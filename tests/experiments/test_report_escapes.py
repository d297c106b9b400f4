"""Names that are programs: whatever models, methods, metrics and recipes are called, the page shows it and
runs none of it."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from hpd.experiments.output import render_markdown, write_report
from hpd.experiments.pages import render_page
from hpd.experiments.report import file_name, report_on
from hpd.experiments.results import Results, Run

NASTY = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(2)'>",
    "a & b &lt;i&gt; 'c' \"d\"",
    "</svg></style><b>e</b>",
)
VOID = ("meta", "link", "br", "img", "input", "hr", "use")


class _Page(HTMLParser):
    """What a browser would make of it: elements in their order, texts, attributes."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))


def hostile_results():
    """Runs over training with names of this kind in every place that a report shows."""
    runs = []
    for number, name in enumerate(NASTY):
        for limit in ("100", "1000"):
            for seed in (0, 1, 2):
                value = 0.1 * number + 0.01 * seed + (limit == "100")
                logs = [
                    {"step": s, "loss": 1.0 / s, "forward_kl": value / s, f"<i>{name}": 1.0}
                    for s in (1, 2, 3)
                ]
                record = {"text": name, "correct": True, "prompt": " ".join(NASTY), "answer": name}
                answers = {"accuracy": {"1": record}}
                runs.append(
                    Run(
                        folder=Path("."),
                        axes={"method": name, f"data.{NASTY[0]}": limit},
                        group=f"{name}, {limit}",
                        seed=seed,
                        recipe={"student": {"model": name}, "method": name, "seed": seed, NASTY[1]: name},
                        figures={f"acc {name}": value, "accuracy": value, "forward_kl": value},
                        logs=logs,
                        records={},
                        answers=answers,
                        environment={"hpd": name, "platform": NASTY[2], "packages": {NASTY[0]: name}},
                        cost={"seconds": 1.0, "train seconds": 1.0},
                        teacher={f"acc {name}": 1.0},
                    )
                )
    return Results(
        title=NASTY[0], runs=runs, axes=("method", f"data.{NASTY[0]}"), teacher={f"acc {NASTY[1]}": 1.0}
    )


@pytest.fixture(scope="module")
def report():
    results = hostile_results()
    return report_on(results, next(iter(results.groups)))._replace(question=NASTY[1])


@pytest.fixture(scope="module")
def page(report):
    return _Page(render_page(report))


def test_no_element_or_attribute_comes_from_a_name(page):
    assert page.tags.count("script") == 1
    assert page.tags.count("style") <= 1 + page.tags.count("svg")
    assert not {"img", "b", "i", "iframe", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    for name, value in page.attributes:
        if name in ("href", "xlink:href"):
            assert value.startswith(("#", "data:")), value
    identities = [value for name, value in page.attributes if name == "id"]
    assert len(identities) == len(set(identities))
    assert not [value for value in identities if set(value) & set("<>\"'& ")]


def test_every_name_is_shown_as_it_is(page):
    for name in NASTY:
        places = {tag for tag, text in page.texts if name in text}
        assert {"td", "pre", "code"} <= places, (name, places)
    assert ("p", NASTY[1]) in page.texts
    assert page.texts[[tag for tag, _ in page.texts].index("title")][1] == NASTY[0]


def test_figures_show_names_in_their_titles_and_legends(report, page):
    titles = [panel.title for section in report.sections for panel in section.panels]
    assert any(NASTY[0] in title for title in titles)
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert set(titles) <= set(labels)
    drawn = " ".join(text for tag, text in page.texts if tag in ("text", "tspan"))
    assert NASTY[0] in drawn
    assert NASTY[2] in drawn


def test_files_keep_within_the_folder(report, tmp_path):
    folder = tmp_path / "report"
    sections = [
        section._replace(
            tables=[t._replace(key=f"../../{t.key}") for t in section.tables],
            panels=[p._replace(key=f"/etc/{p.key}") for p in section.panels[:1]],
        )
        for section in report.sections
    ]
    write_report(report._replace(sections=sections), folder)
    assert {path.name for path in tmp_path.iterdir()} == {"report"}
    assert {path.name for path in folder.iterdir()} == {"index.html", "report.md", "data", "plots"}
    assert (folder / "data" / "results.csv").is_file()
    assert file_name("../..") == "unnamed"


def test_markdown_has_no_markup_of_a_name(report):
    text = render_markdown(report)
    assert "<script" not in text
    assert "<img" not in text
