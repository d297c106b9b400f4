"""One operator for every method."""

from hpd.losses.heads import Head, Scores, TeacherScores, TopKScores, head_of
from hpd.losses.operator import LossOutput, reweighted_nll

__all__ = ["Head", "LossOutput", "Scores", "TeacherScores", "TopKScores", "head_of", "reweighted_nll"]
