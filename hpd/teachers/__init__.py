"""Where the teacher's distribution comes from."""

from hpd.teachers.model import ModelTeacher, RemoteTeacher, SelfTeacher, Teacher, TeacherUnavailable

__all__ = ["ModelTeacher", "RemoteTeacher", "SelfTeacher", "Teacher", "TeacherUnavailable"]
