"""The report of really trained runs: its numbers, its text forms, and its page in a real browser."""

import csv
import json
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from helpers.browser import set_view, start_browser
from helpers.forked import hpd
from helpers.grid_results import comparison
from helpers.tiny_grid import SCRIPT, command, tiny_grid

from hpd.experiments.experiment import read_experiment
from hpd.experiments.figures import FORMATS, Panel, new_axes, to_files, to_svg
from hpd.experiments.live import Watcher, make_server
from hpd.experiments.metrics import scale_of
from hpd.experiments.output import render_markdown, write_report
from hpd.experiments.pages import render_page
from hpd.experiments.report import Section, build_report
from hpd.experiments.results import read_results
from hpd.experiments.statistics import correct
from hpd.experiments.verdicts import comparison_table, verdict_table

PHONE_WIDTH = 390


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    return tiny_grid(tmp_path_factory)


@pytest.fixture(scope="module")
def page(grid):
    return (grid / "report" / "index.html").read_text(encoding="utf-8")


def test_the_numbers_are_those_of_the_runs(grid):
    with (grid / "report" / "data" / "results.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    for method in ("hpd", "forward_kl"):
        found = [
            json.loads((grid / "runs" / f"{method}__seed-{seed}" / "summary.json").read_text())
            for seed in (0, 1)
        ]
        expected = sum(summary["forward_kl after"] for summary in found) / 2
        assert float(rows[method]["forward kl"]) == pytest.approx(expected)
        assert rows[method]["seeds"] == "2"
    assert rows["teacher"]["accuracy"] == str(
        json.loads((grid / "teacher" / "figures.json").read_text())["accuracy"]
    )


def test_two_seeds_get_no_verdict_but_a_warning(grid):
    report = build_report([grid])
    assert [c.metric for c in report.comparisons] == ["accuracy", "forward_kl"]
    assert report.comparisons[0].num_examples == 6
    assert report.comparisons[0].p_permutation >= 0.5
    assert {c.verdict for c in report.comparisons} == {"too few seeds"}
    assert "2 of 2 comparisons have 2 seeds and no verdict" in report.warnings[0]
    assert report.summary == "Against forward_kl, 2 tests, Holm's correction: too few seeds: 2."
    assert report.status.startswith("4 of 4 runs finished, 2 methods, 2 seeds")


def test_the_terminal_shows_one_table_and_the_warning(grid, tmp_path):
    done = command("report", grid, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "against forward_kl" in text
    assert "warning: 2 of 2 comparisons have 2 seeds and no verdict" in text
    assert "plots/*.{png,svg,pdf}" in text
    assert "no consistent win" not in text
    assert f"next: hpd report {grid} --watch" in done.output


def test_the_runs_are_written_down_one_by_one(grid):
    with (grid / "report" / "data" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"]) for row in rows] == [
        (method, seed) for method in ("hpd", "forward_kl") for seed in "01"
    ]
    summary = json.loads((grid / "runs" / "hpd__seed-1" / "summary.json").read_text())
    assert float(rows[1]["forward kl"]) == summary["forward_kl after"]


def test_every_table_and_plot_lies_beside_the_page_as_a_file(grid):
    folder = grid / "report"
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    pictures = re.findall(r"\]\((plots/[^)]+\.png)\)", markdown)
    assert len(pictures) >= 8
    for picture in pictures:
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
        for kind in FORMATS:
            assert 0 < (folder / picture).with_suffix(f".{kind}").stat().st_size < 300_000
        assert (folder / "data" / f"{picture.removeprefix('plots/').removesuffix('.png')}.csv").is_file()
    for title in (
        "Results",
        "Verdicts",
        "Tests",
        "Robustness to the tuned settings",
        "Over training",
        "Stability",
        "Recipes",
        "Environment",
    ):
        assert f"## {title}" in markdown
    assert "| weight\\_decay" not in markdown.split("\n")[0]
    for line in markdown.split("\n"):
        assert line.count("<script") == 0


def test_recipes_are_compared_key_by_key(grid):
    with (grid / "report" / "data" / "recipes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {"hpd", "forward_kl"}
    assert set(rows[0]) <= {"method", "train.weight_decay"}


def test_text_of_models_and_users_is_escaped(grid, page):
    assert SCRIPT not in page
    assert "&lt;script&gt;" in page
    assert "<b>calm</b>" not in page
    assert page.count("<script>") == 1
    assert "default-src 'none'" in page
    assert not re.search(r'(src|href)="(https?:)?//', page)


def test_plain_run_folders_get_a_report_and_a_baseline(grid, tmp_path):
    runs = sorted((grid / "runs").iterdir())
    chosen = json.loads((grid / "tuned.json").read_text())
    decays = {choice["group"]: choice["chosen"] for choice in chosen}
    # Recipe keys that differ are the axes; a decay that both were tuned to is none.
    baseline = "forward_kl" + (
        f", weight_decay={decays['forward_kl']}" if len(set(decays.values())) > 1 else ""
    )
    done = command("report", *runs, "--output", tmp_path / "out", "--baseline", baseline)
    assert done.exit_code == 0, done.output
    assert "against forward_kl" in done.output or " forward_kl" in done.output
    assert (tmp_path / "out" / "index.html").is_file()
    assert "--baseline" in done.output.partition("next: ")[2]
    assert command("report", *runs, "--baseline", "nobody").exit_code == 2
    assert command("report", grid / "runs").exit_code == 2


def test_runs_of_other_software_are_refused_unless_allowed(grid, tmp_path):
    copies = [
        shutil.copytree(grid / "runs" / f"{method}__seed-0", tmp_path / method)
        for method in ("hpd", "forward_kl")
    ]
    path = copies[0] / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "python": "2.7"}))
    with pytest.raises(ValueError, match="python: 2.7 and"):
        read_results(copies)
    assert len(read_results(copies, ["python"]).runs) == 2


def test_an_unfinished_run_is_counted_and_its_curve_is_drawn(grid, tmp_path):
    copy = shutil.copytree(grid, tmp_path / "grid")
    unfinished = copy / "runs" / "hpd__seed-1"
    for name in ("summary.json", "experiment.json"):
        (unfinished / name).unlink()
    with (unfinished / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # a line that is being written
    report = build_report([copy])
    assert report.status.startswith("3 of 4 runs finished")
    assert "too few seeds" in report.summary
    shutil.rmtree(copy / "runs")
    empty = build_report([copy])
    assert empty.status.startswith("0 of 4 runs finished")
    assert empty.verdicts is None
    assert "<html" in render_page(empty)


def test_figures_follow_the_colors_of_the_page():
    def draw(figure):
        (axis,) = new_axes(figure)
        axis.plot([0, 1], [0, 1], color="#3f7fc1")
        axis.set_xlabel("step <i>")

    svg = to_svg(Panel("curve", 'a "title" <b>', ("x", "y"), [(0, 0)], draw))
    assert "currentColor" in svg
    assert "var(--line)" in svg
    assert "step &lt;i&gt;" in svg
    assert 'aria-label="a &quot;title&quot; &lt;b>"' in svg
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert ids
    assert all(name.startswith("curve-") for name in ids)
    for used in re.findall(r'xlink:href="#([^"]+)"', svg):
        assert used in ids


def test_watch_serves_this_machine_only_and_sees_new_results(grid, tmp_path):
    copy = shutil.copytree(grid, tmp_path / "grid")
    watcher = Watcher([copy], lambda: render_page(build_report([copy]), live=True))
    with make_server(watcher, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert server.server_address[0] == "127.0.0.1"
        address = f"http://127.0.0.1:{server.server_port}"

        def get(path, host=None):
            request = urllib.request.Request(address + path, headers={"Host": host} if host else {})
            return urllib.request.urlopen(request, timeout=60).read().decode()

        assert "4 of 4 runs finished" in get("/")
        first = get("/version")
        assert get("/version") == first
        (copy / "runs" / "hpd__seed-1" / "summary.json").unlink()
        (copy / "runs" / "hpd__seed-1" / "experiment.json").unlink()
        assert get("/version") != first
        assert "3 of 4 runs finished" in get("/")
        for path, host in (("/", "evil.example"), ("/../etc/passwd", None)):
            with pytest.raises(urllib.error.HTTPError):
                get(path, host)
        server.shutdown()


def test_watch_command_prints_its_address(grid):
    process = subprocess.Popen(
        [sys.executable, "-m", "hpd", "report", str(grid), "--watch", "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert address, line
        assert "<html" in urllib.request.urlopen(address[0], timeout=60).read().decode()
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = start_browser(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


def show(browser, grid, width=1200, scheme="light"):
    set_view(browser, width, scheme=scheme)
    browser.get((grid / "report" / "index.html").as_uri())


def test_page_in_a_browser_has_plots_and_no_errors(grid, browser):
    show(browser, grid)
    assert browser.get_log("browser") == []
    assert browser.title == "tiny"
    assert browser.execute_script("return document.querySelectorAll('figure svg').length") >= 8
    empty = (
        "return [...document.querySelectorAll('figure svg')]"
        ".filter(s => s.getBBox().width < 50 || !s.querySelector('path')).length"
    )
    assert browser.execute_script(empty) == 0
    ids = "const ids = [...document.querySelectorAll('[id]')].map(e => e.id);"
    twice = f"{ids} return ids.filter((x, i) => ids.indexOf(x) !== i)"
    assert browser.execute_script(twice) == []


def test_tables_sort_on_click(grid, browser):
    show(browser, grid)
    column = (
        "const t = document.querySelector('#results table'); const i = "
        "[...t.tHead.rows[0].cells].findIndex(c => c.textContent.trim() === 'loss'); return "
        "[...t.tBodies[0].rows].map(r => r.cells[i].dataset.sort)"
    )
    click = (
        "[...document.querySelectorAll('#results th button')].find(b => b.textContent.trim() === "
        "'loss').click();"
        "return [...document.querySelectorAll('#results th')].map(h => "
        "h.getAttribute('aria-sort')).filter(Boolean)"
    )
    assert browser.execute_script(click) == ["ascending"]
    rising = browser.execute_script(column)
    assert browser.execute_script(click) == ["descending"]
    falling = browser.execute_script(column)
    # The teacher has no loss: what is empty stays last.
    assert rising[-1] == falling[-1] == ""
    values = [float(value) for value in rising[:-1]]
    assert values == sorted(values)
    assert falling[:-1] == rising[:-1][::-1]
    assert len(set(values)) == 2


def test_phone_width_and_dark_mode(grid, browser):
    show(browser, grid, PHONE_WIDTH, "dark")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= PHONE_WIDTH
    paper, ink, curve = browser.execute_script(
        "const s = e => getComputedStyle(e); return [s(document.body).backgroundColor, "
        "s(document.body).color, s(document.querySelector('figure svg text')).fill]"
    )
    dark, light = ([int(x) for x in re.findall(r"\d+", color)[:3]] for color in (paper, ink))
    assert max(dark) < 60
    assert min(light) > 180
    assert curve == ink  # figures follow
    smallest = browser.execute_script(
        "return Math.min(...[...document.querySelectorAll('figure svg text')].map(t => "
        "t.getBoundingClientRect().height))"
    )
    assert smallest >= 8
    show(browser, grid, PHONE_WIDTH)
    assert (
        browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        == "rgb(255, 255, 255)"
    )


def test_script_in_an_answer_is_shown_and_not_run(grid, browser):
    show(browser, grid)
    assert browser.title == "tiny"
    assert SCRIPT in browser.execute_script("return document.querySelector('#samples').textContent")


def test_trackers_come_from_the_trainer(grid, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    recipe = grid / "runs" / "forward_kl__seed-0" / "recipe.yaml"
    done = hpd(
        "train", recipe, f"output_dir={tmp_path / 'run'}", "train.report_to=tensorboard", "train.max_steps=2"
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_markdown_cells_cannot_start_markup(grid, tmp_path):
    report = build_report([grid])._replace(title="a | b *c*", warnings=["<img src=x onerror=alert(1)>"])
    text = render_markdown(report)
    assert "# a \\| b \\*c\\*" in text
    assert "<img" not in text
    assert write_report(report._replace(sections=report.sections[:1]), tmp_path / "again").is_file()


def test_experiment_file_of_the_report_is_the_frozen_copy(grid):
    frozen = read_experiment((grid / "experiment.yaml").read_text())
    assert frozen.name == build_report([grid]).title == "tiny"


@pytest.mark.slow
def test_results_script_fills_the_tables_of_a_page(grid, tmp_path, monkeypatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location(
        "results_script", Path(__file__).resolve().parents[2] / "scripts" / "results.py"
    )
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page, blocks = tmp_path / "results.md", ("results", "verdicts", "verdicts hpd", "stability")
    page.write_text(
        "# R\n" + "".join(f"\n<!-- table grid {block} -->\n<!-- end -->\n" for block in blocks) + "\nend\n"
    )
    monkeypatch.setattr(script, "PAGES", [page])
    monkeypatch.setattr(script, "TARGET", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["results.py", "--runs", str(grid.parent)])
    for _ in range(2):  # filled again, nothing is added
        script.main()
        text = page.read_text()
        assert text.count("<!-- table grid") == text.count("<!-- end -->") == len(blocks)
    assert "| against forward\\_kl | accuracy | forward kl |" in text
    assert "| against hpd | accuracy | forward kl |" in text
    assert text.count("| too few seeds: 2 seeds") == 4  # two seeds bear no finding
    assert (tmp_path / "results" / "grid" / "report.md").is_file()
    assert not (tmp_path / "results" / "grid" / "index.html").exists()


def test_a_dollar_in_a_name_is_no_formula():
    def draw(figure):
        (axis,) = new_axes(figure)
        axis.plot([0, 1], [0, 1], label="costs $\\frac$ more")
        axis.legend()

    panel = Panel("k", "title of $\\frac$", ("x",), [(0,)], draw)
    assert to_files(panel)["png"].startswith(b"\x89PNG")
    assert "costs $\\frac$ more" in to_svg(panel)


def test_the_table_of_sixty_eight_tests_fits_a_laptop(grid, tmp_path, browser):
    """1,280 px wide, nothing of the verdicts and tests lies outside; one table in place of 68 sentences."""
    names = ["forward_kl_one_token", "reverse_kl_one_token", *(f"method_{i}" for i in range(15))]
    metrics = ("accuracy", "sampled_accuracy", "forward_kl", "reverse_kl")
    tests = [
        comparison([-0.6789, -0.7123, -0.6543, -0.6999], name, metric, num_examples=500, p_examples=1e-4)
        for metric in metrics
        for name in names
    ]
    tests = correct(tests, dict.fromkeys(metrics, True))
    scales = {metric: scale_of(metric) for metric in metrics}
    section = Section("tests", "Tests", [comparison_table(tests, scales)], [])
    report = build_report([grid])._replace(
        comparisons=tests, verdicts=verdict_table(tests, scales), sections=[section]
    )
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "index.html").write_text(render_page(report), encoding="utf-8")
    show(browser, tmp_path, 1280)
    cut = (
        "return [...document.querySelectorAll('section > .scroll')]"
        ".map(e => [e.getAttribute('aria-label'), e.scrollWidth - e.clientWidth])"
    )
    assert browser.execute_script(cut) == [["Verdicts", 0], ["Tests against forward_kl", 0]]
    assert browser.execute_script("return document.querySelectorAll('#tests tbody tr').length") == 68
    assert browser.execute_script("return document.querySelectorAll('#verdicts tbody tr').length") == 17
    assert browser.execute_script("return document.querySelectorAll('#verdicts li').length") == 0
    show(browser, tmp_path, PHONE_WIDTH)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= PHONE_WIDTH
