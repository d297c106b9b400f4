"""Where the teacher's distribution comes from."""

from hpd.teachers.cached import CachedTeacher
from hpd.teachers.errors import TeacherUnavailable
from hpd.teachers.mixture import MixtureTeacher, RoutedTeacher
from hpd.teachers.model import ModelTeacher, SelfTeacher
from hpd.teachers.teacher import RemoteTeacher, RoutedScores, Teacher

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
]
