"""Where the teacher's distribution comes from."""

from hpd.teachers.model import ModelTeacher, SelfTeacher, Teacher

__all__ = ["ModelTeacher", "SelfTeacher", "Teacher"]
