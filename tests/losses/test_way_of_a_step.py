"""The way from the operator's front door to an objective is short enough to read."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
import torch
from helpers.problems import problem

import hpd
from hpd.losses import reweighted_nll
from hpd.losses.operator import loss_by_source
from hpd.methods.terms import TermConfig
from hpd.objectives import OBJECTIVES, Objective

PACKAGE = Path(hpd.__file__).parent


def frames_below(function: str, **known: torch.Tensor) -> list[str]:
    """Our own frames, from `function` down to the objective's weights, as file:function."""
    found: list[str] = []

    def watched(weights):
        def spy(*pair):
            ours = [f for f in traceback.extract_stack() if PACKAGE in Path(f.filename).parents]
            # The tests' type checker wraps every function in one of the same file and name: counted once.
            names = [f"{Path(f.filename).name}:{f.name}" for f in ours if f.name != "wrapped_fn"]
            found[:] = [*names[names.index(function) :], "objective.py:weights"]
            return weights(*pair)

        return spy

    made = OBJECTIVES["hpd"]()
    spied = Objective(watched(made.weights), made.value, domain=made.domain, support=made.support)
    given = problem(37)
    given.student.hidden.requires_grad_()  # a step: an evaluation goes another way
    term = TermConfig(objective=spied).build("spied")
    teacher = given.teacher._replace(**known)
    if function == "operator.py:reweighted_nll":
        reweighted_nll(given.student, teacher, given.labels, [term], uniforms=given.uniforms)
    else:
        batch = hpd.batch.TokenBatch(given.labels, given.labels, given.labels, torch.tensor(0))
        loss_by_source(given.student, teacher, batch, [term], uniforms=given.uniforms)
    return found


@pytest.mark.parametrize("known", [{}, {"log_z": torch.zeros(13, dtype=torch.float64)}])
def test_five_frames_and_four_files_from_the_operator_to_the_weights(known):
    way = frames_below("operator.py:reweighted_nll", **known)
    assert len(way) <= 5, way
    assert len({frame.split(":")[0] for frame in way}) <= 4, way


def test_terms_of_all_writers_cost_one_frame():
    way = frames_below("operator.py:loss_by_source")
    assert way[1] == "operator.py:reweighted_nll"
