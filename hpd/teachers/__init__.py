"""Where the teacher's distribution comes from."""

from hpd.teachers.cached import CachedTeacher
from hpd.teachers.mixture import MixtureTeacher, RoutedTeacher, vocab_of
from hpd.teachers.model import ModelTeacher, RoutedScores, SelfTeacher, Teacher

__all__ = [
    "CachedTeacher",
    "MixtureTeacher",
    "ModelTeacher",
    "RoutedScores",
    "RoutedTeacher",
    "SelfTeacher",
    "Teacher",
    "vocab_of",
]
