"""Heat maps, scaling, thirds, tuning and differences: the numbers that they draw."""

import pytest
from helpers.grid_results import comparison, make_results, make_run
from matplotlib.figure import Figure

from hpd.experiments.figures import COLORS, to_files, to_svg
from hpd.experiments.heat_maps import heat_maps
from hpd.experiments.metrics import scale_of
from hpd.experiments.plots import difference_panels, rate_panels, results_looks, scaling_panels, thirds_panels
from hpd.experiments.results import Results
from hpd.experiments.statistics import correct
from hpd.experiments.tuning import Choice


def drawn(panel):
    figure = Figure(layout="constrained")
    panel.draw(figure)
    return figure


def plain(row):
    return tuple(getattr(cell, "sort", cell) for cell in row)


def square(method=None):
    rest = {"method": method} if method else {}
    return [
        {"method_kwargs.reverse": r, "method_kwargs.sample_fraction": d, **rest}
        for r in ("0.5", "1")
        for d in ("0", "0.5", "1")
    ]


def test_heat_map_holds_means_and_intervals_and_has_a_color_bar():
    results = make_results(
        square(), lambda a, seed: float(a["method_kwargs.reverse"]) / 2 + seed / 8, (0, 1, 2)
    )
    (panel,) = heat_maps(results, ["accuracy"])
    rows = {plain(row)[:2]: plain(row)[2:] for row in panel.rows}
    assert len(rows) == 6
    assert rows["0.5", "0"] == pytest.approx((0.375, 0.375 - 0.3105, 0.375 + 0.3105, 3), abs=1e-3)
    figure = drawn(panel)
    assert len(figure.axes) == 2  # the map and its bar
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {"37.5%", "6.4 to 68.6"} <= texts
    assert "one range of colors" in panel.note
    assert to_svg(panel).startswith("<svg role")
    assert to_files(panel)["png"].startswith(b"\x89PNG")


def test_all_heat_maps_of_a_metric_have_one_range():
    def value(axes, seed):
        return {"a": 0.1, "b": 0.9}[axes["method"]] + 0.01 * float(axes["method_kwargs.sample_fraction"])

    panels = heat_maps(make_results(square("a") + square("b"), value), ["accuracy"])
    limits = [drawn(panel).axes[0].collections[0].get_clim() for panel in panels]
    assert limits == [pytest.approx((10, 91))] * 2


def test_scaling_holds_the_means_and_never_leaves_the_range():
    axes = [{"method": m, "data.limit": n} for m in "ab" for n in ("100", "1000")]
    (panel,) = scaling_panels(make_results(axes, lambda a, seed: seed / 2, (0, 1, 2)), ["accuracy"])
    assert panel.title == "accuracy over limit"
    assert plain(panel.rows[0]) == ("a", 100.0, 0.5, 0.0, 1.0)  # Student's would be -0.74 to 1.74
    assert "fewer than 3 seeds" in panel.note


def test_scaling_of_several_settings_has_a_plot_each_with_the_same_methods():
    axes = [
        {"method": m, "text": text, "data.limit": n}
        for m in ("sft", "hpd")
        for text in ("teacher", "human")
        for n in ("64", "1024")
    ]
    results = make_results(axes, lambda a, seed: len(a["text"]) / 10 + seed / 100, (0, 1, 2))
    (panel,) = scaling_panels(results, ["accuracy"], results_looks(results, None))
    figure = drawn(panel)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["text=teacher", "text=human"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sft", "hpd"]
    assert {(row[0], row[1]) for row in panel.rows} == {
        (f"text={text}", name) for text in ("teacher", "human") for name in ("sft", "hpd")
    }
    for axis, value in zip(figure.axes, (0.71, 0.51), strict=True):
        assert [line.get_ydata().tolist() for line in axis.get_lines()[:2]] == [
            pytest.approx([value * 100] * 2)
        ] * 2


def test_entropy_over_an_axis_has_the_teachers_line():
    figures = {"accuracy": 0.5, "student_entropy": 0.1, "teacher_entropy": 0.06}
    runs = [make_run({"method": "a", "data.limit": n}, 0, figures=figures) for n in ("100", "1000")]
    panels = scaling_panels(Results(title="t", runs=runs, axes=("method", "data.limit")), ["accuracy"])
    assert [panel.key for panel in panels] == ["scaling-accuracy-limit", "scaling-student_entropy-limit"]
    assert panels[1].note.endswith("Dotted: the teacher's, 0.0600.")


def test_hpd_has_a_color_behind_the_baseline_wherever_it_stands():
    """In the grids here it was the fifth method, and gray in every figure of theirs."""
    names = ["sft", "a", "b", "c", "hpd", "d", "forward_kl"]
    results = make_results([{"method": name} for name in names], lambda axes, seed: 0.5)
    looks = results_looks(results, {"method": "forward_kl"})
    assert [name for name in names if looks[name].is_named] == ["sft", "a", "b", "hpd", "forward_kl"]
    assert (looks["forward_kl"].color, looks["hpd"].color) == (COLORS[0], COLORS[1])
    settings = [{"method": name, "rows": rows} for name in names for rows in ("own", "others")]
    looks = results_looks(make_results(settings, lambda axes, seed: 0.5), {"method": "forward_kl"})
    assert looks["hpd"].color == COLORS[1]


def test_thirds_of_the_teachers_entropy_are_drawn_where_they_were_measured():
    thirds = {"forward_kl_low_entropy": 0.01, "forward_kl_mid_entropy": 0.02, "forward_kl_high_entropy": 0.3}
    runs = [make_run({"method": m}, s, figures={"accuracy": 0.5, **thirds}) for m in "ab" for s in range(4)]
    results = Results(title="t", runs=runs, axes=("method",))
    (panel,) = thirds_panels(results, results_looks(results, None))
    assert [plain(row)[:3] for row in panel.rows if row[0] == "a"] == [
        ("a", 0, 0.01),
        ("a", 1, 0.02),
        ("a", 2, 0.3),
    ]
    assert thirds_panels(make_results([{"method": "a"}], lambda a, s: 0.5), {}) == []


def test_tuned_values_are_shown_per_setting_and_losses_apart():
    def choices(metric):
        tried = {"0.0": [2.0, 3.0], "0.1": [1.0, 1.5], "1.0": [4.0, 5.0]}
        return [Choice(g, "train.max_grad_norm", metric, "min", 0.1, tried) for g in "ab"]

    rates = [Choice("a", "train.learning_rate", "forward_kl", "min", 1e-3, {"0.001": [1.0], "0.002": [2.0]})]
    first, second = rate_panels(rates + choices("forward_kl"), {})
    assert (first.key, second.key) == ("robustness", "robustness-max_grad_norm")
    (axis,) = drawn(second).axes  # 0, no clipping, has its place
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "0.1", "1"]
    assert "Ring: the value that was taken." in second.note
    (losses,) = rate_panels(choices("loss"), {})
    assert len(drawn(losses).axes) == 2


def test_differences_are_split_where_a_failed_method_stretches_them():
    few = [comparison([0.01, 0.02, 0.03, 0.02], name) for name in ("a", "b", "c")]
    failed = comparison([-0.4, -0.41, -0.42, -0.41], "failed")
    found = correct([*few, failed], {"accuracy": True})
    (panel,) = difference_panels(found, {"accuracy": scale_of("accuracy")})
    left, right = drawn(panel).axes
    assert left.get_xlim()[0] < -41 < left.get_xlim()[1] < right.get_xlim()[0] < 0 < 2 < right.get_xlim()[1]
    assert "The axis is split" in panel.note
    assert "over 4 seeds" in panel.note
    assert plain(panel.rows[-1])[0:2] == ("failed", pytest.approx(-0.41))
