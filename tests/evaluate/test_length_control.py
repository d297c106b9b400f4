"""What the length-controlled win rate needs beside verdicts: estimates, or a file."""

from pathlib import Path

import numpy as np
import pytest

from hpd.evaluate.benchmarks.length_control import (
    Copies,
    LengthControl,
    instruction_key,
    published_control,
    read_control,
)
from hpd.evaluate.benchmarks.rows import read_rows
from hpd.evaluate.benchmarks.win_rates import length_controlled_win_rate

ESTIMATES = Path(__file__).parents[2] / "hpd/evaluate/benchmarks/alpaca_eval_2.csv.gz"
BROADWAY = "What are the names of some famous actors that started their careers on Broadway?"


def test_the_estimates_are_of_alpaca_evals_805_instructions():
    rows = read_rows(ESTIMATES)
    assert len({row["key"] for row in rows}) == 805
    assert instruction_key(BROADWAY) == rows[0]["key"]
    control = published_control([BROADWAY])
    assert control.difficulty == pytest.approx([float(rows[0]["difficulty"])])
    assert control.copies.won.shape == (1610,)
    # The copies' published win rates: 22.92 and 64.30 %.
    halves = control.copies.won.reshape(2, 805).mean(1)
    assert halves == pytest.approx([0.2292, 0.6430], abs=0.02)
    short, long = control.copies.length.reshape(2, 805).mean(1)
    assert short < 0 < long


def test_published_coefficients_give_published_rates():
    """The rates that AlpacaEval 2 states for its coefficients: means of sigma(theta + psi gamma)."""
    difficulty = np.array([float(row["difficulty"]) for row in read_rows(ESTIMATES)])
    published = {  # model: theta, psi, length-controlled win rate in %
        "gpt4_1106_preview_verbose": (0.1923534665807022, 0.8334888457867451, 51.58),
        "gpt4_1106_preview_concise": (-0.3182055425894927, 0.6835779026468267, 41.90),
        "gpt4_0613": (-0.9832327944321382, 0.8150202748700113, 30.18),
        "Meta-Llama-3-8B-Instruct": (-1.6185347123220444, 1.0601549714712668, 22.92),
    }
    for theta, psi, rate in published.values():
        rates = 1 / (1 + np.exp(-(theta + psi * difficulty)))
        assert 100 * rates.mean() == pytest.approx(rate, abs=0.1)


def test_copies_hold_a_candidate_whose_answers_are_all_short():
    """Judges who prefer length: where every answer of a candidate is as short, only the copies say so."""
    generator = np.random.default_rng(0)
    size = 805
    gap = -1500 + generator.normal(0, 200, size)
    wins = (generator.random(size) < 0.1).astype(float)
    rows = read_rows(ESTIMATES)
    difficulty = np.array([float(row["difficulty"]) for row in rows])
    copies = published_control([BROADWAY]).copies
    alone = LengthControl(difficulty, Copies(*np.zeros((3, 0))))
    given = np.zeros(size), -gap
    held = length_controlled_win_rate(wins, *given, LengthControl(difficulty, copies))
    assert held.coefficients["length"] > 1
    assert 0.2 < held.value < 0.5
    assert abs(length_controlled_win_rate(wins, *given, alone).value - held.value) > 0.05


def test_the_authors_file_goes_before_the_estimates(tmp_path):
    path = tmp_path / "df_gamed.csv"
    head = "model,preference,std_delta_len,index,instruction_difficulty,not_gamed_baseline\n"
    path.write_text(head + "concise,0.2,1.5,0,-1.0,False\nverbose,0.8,-1.5,1,2.0,False\n")
    control = read_control(path, ["1", "0"])
    assert control.difficulty.tolist() == [2.0, -1.0]
    assert control.copies.length == pytest.approx(np.tanh([-1.5, 1.5]))  # theirs is baseline minus candidate
    assert control.copies.won.tolist() == [0.2, 0.8]
    path.write_text(head + "concise,0.2,1.5,0,,False\n")
    with pytest.raises(ValueError, match="instruction_difficulty is '' in a row"):
        read_control(path, ["0"])


def test_difficulties_alone_get_the_estimated_copies(tmp_path):
    path = tmp_path / "instruction_difficulty.csv"
    path.write_text("index,instruction_difficulty\n" + "".join(f"{n},{n / 805}\n" for n in range(805)))
    control = read_control(path, ["3"])
    assert control.difficulty == pytest.approx([3 / 805])
    assert control.copies.difficulty[:2] == pytest.approx([0, 1 / 805])
    with pytest.raises(ValueError, match="no difficulty for 1 instructions"):
        read_control(path, ["805"])


def test_other_instructions_have_no_difficulty():
    with pytest.raises(ValueError, match=r"1 of 2 instructions are not AlpacaEval's \(the first: 'Mine'\)"):
        published_control([BROADWAY, "Mine"])
