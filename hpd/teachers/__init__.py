"""Where the teacher's distribution comes from."""

from hpd.teachers.cached import CachedTeacher
from hpd.teachers.errors import TeacherUnavailable
from hpd.teachers.mixture import MixtureTeacher, RoutedTeacher, vocab_of
from hpd.teachers.model import ModelTeacher, RemoteTeacher, RoutedScores, SelfTeacher, Teacher

__all__ = [
    "CachedTeacher",
    "MixtureTeacher",
    "ModelTeacher",
    "RemoteTeacher",
    "RoutedScores",
    "RoutedTeacher",
    "SelfTeacher",
    "Teacher",
    "TeacherUnavailable",
    "vocab_of",
]
