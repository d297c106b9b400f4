"""Line figures: which lines have colors, where an axis is split, what a caption says."""

import itertools
import re

import pytest
from matplotlib.figure import Figure

from hpd.experiments.figures import COLORS, OTHERS, _figure, looks_of, to_files, to_svg
from hpd.experiments.lines import line_panel, multiples_panel
from hpd.experiments.metrics import Scale
from hpd.experiments.split import split


def drawn(panel):
    figure = Figure(layout="constrained")
    panel.draw(figure)
    return figure


def flat(value):
    return [(1, value, value, value), (2, value, value, value)]


@pytest.mark.parametrize(
    ("ranges", "parts"),
    [
        ([(0, 1), (0, 2), (1, 3)], [(0, 3)]),
        ([(0, 1), (0, 2), (1, 2), (40, 50)], [(0, 2), (40, 50)]),
        ([(-90, -80), (-3, 0), (-2, 1), (0, 0)], [(-90, -80), (-3, 1)]),
        # One that reaches over both parts does not keep the axis from being split.
        ([(0, 0), (-3, 1), (-2, 0), (-60, 1)], [(-60, -3), (-3, 1)]),
        ([(0, 0), (-0.03, 0.28)], [(-0.03, 0.28)]),  # two items are no majority
        ([(0, 0), (0, 0), (5, 5)], [(0, 5)]),  # no room to compare with
        ([(0, 1), (10, 11), (20, 21), (30, 31)], [(0, 31)]),  # spread, not stretched
        ([(2, 2)], [(2, 2)]),
    ],
)
def test_an_axis_is_split_where_few_items_stretch_it(ranges, parts):
    assert split(ranges).parts == parts


def test_a_split_axis_shows_every_line_in_its_part_and_says_so():
    lines = {"a": [(1, 0.1, 0, 0), (2, 0.2, 0, 0)], "b": flat(0.15), "c": flat(0.12), "failed": flat(9.0)}
    panel = line_panel("k", "t", lines, note="Band: none.")
    upper, lower = drawn(panel).axes
    assert lower.get_ylim()[1] < 1 < upper.get_ylim()[0] < 9 < upper.get_ylim()[1]
    assert panel.note == "Band: none. The axis is split and each part has its own scale."
    for kind, content in to_files(panel).items():
        assert 1000 < len(content) < 300_000, kind
    assert len(drawn(line_panel("k", "t", dict(list(lines.items())[:3]))).axes) == 1


def test_five_lines_have_colors_and_the_rest_is_gray_with_one_entry_in_the_legend():
    names = [f"m{i}" for i in range(9)]
    looks = looks_of(names, first="m7")
    assert [name for name in names if looks[name].is_named] == ["m0", "m1", "m2", "m3", "m7"]
    assert looks["m7"].color == COLORS[0]
    assert {looks[name].color for name in names if not looks[name].is_named} == {OTHERS}
    assert len({looks[name].color for name in names if looks[name].is_named}) == 5
    figure = drawn(line_panel("k", "t", {name: flat(i + 1.0) for i, name in enumerate(names)}, looks=looks))
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["m0", "m1", "m2", "m3", "m7", "4 others"]


def test_the_teachers_line_is_drawn_and_its_value_is_in_the_caption():
    panel = line_panel("k", "t", {"a": flat(0.5)}, level=(0.06, 0.06, 0.06))
    (axis,) = drawn(panel).axes
    assert [line.get_ydata()[0] for line in axis.get_lines() if line.get_label() == "teacher"] == [0.06]
    assert panel.note == "Dotted: the teacher's, 0.0600."
    several = line_panel("k", "t", {"a": flat(0.5)}, level=(0.06, 0.05, 0.07))
    assert "shaded from the lowest to the highest, 0.0500 to 0.0700" in several.note


def test_shares_are_drawn_in_percent_and_written_as_they_are():
    panel = line_panel("k", "t", {"a": flat(0.5)}, scale=Scale(0.0, 1.0, True))
    (axis,) = drawn(panel).axes
    assert axis.get_lines()[0].get_ydata()[0] == 50
    assert axis.get_ylabel() == "%"
    assert panel.rows[0][2] == ("50.0%", 0.5, "", "", None)


def test_each_small_plot_has_its_own_axis_and_gray_lines_of_one_plot_are_told_apart():
    looks = looks_of([f"m{i}" for i in range(8)])
    plots = {"small": {"m0": flat(0.1)}, "large": {"m6": flat(90.0), "m7": flat(91.0)}}
    small, large = (axis for axis in drawn(multiples_panel("k", "t", plots, looks=looks)).axes)
    assert small.get_ylim()[1] < 1 < 80 < large.get_ylim()[0]
    assert small.get_title(loc="left") == "small"
    assert len({line.get_color() for line in large.get_lines()}) == 2
    shared = {name: {"x": flat(0.1), "y": flat(0.2)} for name in ("a", "b")}
    figure = drawn(multiples_panel("k", "t", shared, share_y=True))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["x", "y"]


def test_equal_figures_are_equal_files_without_a_date():
    def make():
        return line_panel("k", "KL of a | b", {"hpd": flat(1.0), "sft": flat(2.0)}, note="Band: none.")

    first, second = to_files(make()), to_files(make())
    assert first == second
    assert list(first) == ["png", "svg", "pdf"]
    assert first["png"].startswith(b"\x89PNG")
    assert first["pdf"].startswith(b"%PDF")
    assert b"CreationDate" not in first["pdf"]
    assert not re.search(rb"\b20\d\d-\d\d-\d\dT", first["svg"])
    svg = first["svg"].decode()
    assert "KL of a | b" in svg  # text as text, title and caption included
    assert "Band: none." in svg
    assert "Band: none." not in to_svg(make())  # the page has both as text


def test_powers_of_a_logarithmic_axis_are_plain_numbers():
    panel = line_panel("k", "KL", {"hpd": [(1, 2.0, 2.0, 2.0), (2, 0.002, 0.002, 0.002)]}, log=True)
    assert ">0.01<" in to_svg(panel)
    assert "mathdefault" not in to_svg(panel)


def test_a_logarithmic_axis_shows_the_means_and_says_that_bands_are_cut():
    """A band down to nearly nothing made a dozen labels that overlap, and pressed the lines together."""
    near = [(0, 0.002, 1e-7, 0.004), (1, 0.1, 0.05, 0.2)]
    plots = {"a": {"x": near, "y": near}, "b": {"x": [(0, 3.0, 2.0, 4.0), (1, 3.0, 2.0, 4.0)], "y": near}}
    long = "third of the positions, by the teacher's entropy"
    panel = multiples_panel("k", "KL", plots, log=True, share_y=True, x_label=long, note="Band: none.")
    for axis in drawn(panel).axes:
        low, high = axis.get_ylim()
        assert 2e-4 < low < 0.002
        assert 4.0 < high < 10
        assert sum(low <= tick <= high for tick in axis.get_yticks()) <= 6
    assert panel.note == "Band: none. Bands end where the axis does."
    whole = line_panel("k", "KL", {"hpd": [(1, 2.0, 1.0, 3.0), (2, 0.002, 0.001, 0.003)]}, log=True)
    assert whole.note == ""
    (axis,) = drawn(whole).axes
    assert axis.get_ylim()[0] < 0.001 < 3.0 < axis.get_ylim()[1]


def test_plots_of_some_of_the_same_lines_share_one_legend_and_its_colors():
    line = [(1, 0.5, 0.4, 0.6), (2, 0.4, 0.3, 0.5)]
    plots = {"masked_sft, rows=four_fifths": {"under": line}, "hpd": {"kept": line, "under": line}}
    figure = Figure(layout="constrained")
    multiples_panel("branches", "shares", plots).draw(figure)
    first, second = figure.axes
    assert [axis.get_legend() for axis in figure.axes] == [None, None]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["kept", "under"]
    assert first.lines[0].get_color() == second.lines[1].get_color() != second.lines[0].get_color()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_no_text_of_small_plots_is_cut_off_or_lies_over_its_neighbor(count):
    line = [(1, 0.5, 0.4, 0.6), (2, 0.4, 0.3, 0.5)]
    names = [f"hpd_no_draw, limit={2**i}, text=human_written" for i in range(count)]
    long = "third of the positions, by the teacher's entropy"
    panel = multiples_panel("k", "t", {name: {"a": line} for name in names}, share_y=True, x_label=long)
    figure = _figure(panel, alone=False)
    figure.draw_without_rendering()
    width = figure.bbox.width
    places = [axis._left_title.get_window_extent() for axis in figure.axes if axis.get_visible()]
    places += [axis.xaxis.label.get_window_extent() for axis in figure.axes if axis.get_xlabel()]
    assert all(place.x0 >= 0 and place.x1 <= width for place in places)
    for one, other in itertools.combinations(places, 2):
        assert not one.overlaps(other)
