"""The museum itself: its list, and what an exhibit asserts."""

import ast
import re
from pathlib import Path

import pytest
import torch
from helpers.museum import distance, exhibit, swap

from hpd.methods import sampling

MUSEUM = Path(__file__).parent


def exhibits() -> dict[str, list[str]]:
    """Names of the exhibits of each file."""
    files = sorted(set(MUSEUM.glob("test_*.py")) - {Path(__file__)})
    return {
        file.name: [
            node.name
            for node in ast.parse(file.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        ]
        for file in files
    }


def listed() -> dict[str, list[list[str]]]:
    """Rows of the table under each file's heading."""
    found: dict[str, list[list[str]]] = {}
    file = ""
    for line in (MUSEUM / "README.md").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"## .*\(`(test_\w+\.py)`\)$", line):
            file = heading[1]
        elif line.startswith("| `test_"):
            found.setdefault(file, []).append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def test_list_names_every_exhibit_in_order():
    assert {file: [row[0].strip("`") for row in rows] for file, rows in listed().items()} == exhibits()


def test_every_row_says_where_the_bug_was_published_what_holds_and_what_breaks_it():
    for rows in listed().values():
        for row in rows:
            assert len(row) == 4, row
            assert re.search(r"\]\(https://github\.com/[\w.-]+/[\w.-]+(/(issues|pull)/\d+)?\)", row[1]), row
            assert all(len(cell) > 20 for cell in row[2:]), row


def test_number_of_exhibits_is_the_one_that_is_said():
    said = re.search(r"^(\d+) exhibits", (MUSEUM / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert said is not None
    assert int(said[1]) == sum(map(len, exhibits().values()))


def test_exhibit_wants_a_property_that_holds_and_a_mutant_that_breaks_it():
    def nothing(patch):
        pass

    with pytest.raises(AssertionError, match="ours is wrong"):
        exhibit(lambda: (1.0, 2.0), nothing)
    with pytest.raises(AssertionError, match="not caught"):
        exhibit(lambda: (1.0, 1.0), nothing)


def test_swap_replaces_a_name_wherever_it_is_held_and_takes_it_back():
    from hpd.generation import drawing

    original = sampling.inverse_cdf
    with pytest.MonkeyPatch.context() as patch:
        swap(patch, "hpd.methods.sampling:inverse_cdf", lambda before: len)
        assert drawing.inverse_cdf is sampling.inverse_cdf is len
    assert drawing.inverse_cdf is sampling.inverse_cdf is original


@pytest.mark.parametrize("target", ["hpd.gone:name", "hpd.batch:gone", "hpd.batch:TokenBatch.gone"])
def test_place_that_is_gone_is_named(target):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(pytest.fail.Exception, match=target):
        swap(patch, target, lambda original: original)


def test_distance_is_relative_to_what_is_right():
    assert distance(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0])) == 0.5
    assert distance(torch.tensor([0.0, 0.25]), torch.zeros(2)) == 0.25
    assert distance(torch.tensor(float("nan")), torch.tensor(1.0)) == float("inf")
    assert distance([1, 2], [1, 2]) == 0.0
    assert distance([1], [1, 2]) == float("inf")
