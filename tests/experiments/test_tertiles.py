"""Figures of positions, and their means by the teacher's entropy."""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from hpd.experiments.tertiles import FIGURES, by_entropy, position_figures


def test_figures_of_a_position_are_entropies_and_kls_over_the_students_vocabulary():
    torch.manual_seed(0)
    teacher, student = torch.randn(5, 9), torch.randn(5, 7)
    found = position_figures(teacher, student)
    p, q = Categorical(logits=teacher[:, :7].double()), Categorical(logits=student.double())
    expected = torch.stack([p.entropy(), q.entropy(), kl_divergence(p, q), kl_divergence(q, p)], -1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="equal vocabularies, got 9 and 7"):
        position_figures(student, teacher)


def test_thirds_follow_the_teachers_entropy_and_nothing_else():
    entropy = torch.tensor([5.0, 1.0, 3.0, 2.0, 6.0, 4.0, 7.0])
    rows = torch.stack([entropy, -entropy, 10 * entropy, 100 * entropy], -1)
    found = by_entropy(rows[torch.randperm(7)])
    assert found["forward_kl_low_entropy"] == pytest.approx(20.0)  # 1, 2, 3: the first thirds are the longer
    assert found["forward_kl_mid_entropy"] == pytest.approx(45.0)
    assert found["reverse_kl_high_entropy"] == pytest.approx(650.0)
    assert len(found) == 6
    assert FIGURES.index("teacher_entropy") == 0


def test_fewer_positions_than_thirds_are_refused():
    with pytest.raises(ValueError, match="three or more label positions, got 2"):
        by_entropy(torch.zeros(2, 4))
