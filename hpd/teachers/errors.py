"""The error of a teacher elsewhere."""

from hpd.http import ServerUnavailable

__all__ = ["TeacherUnavailable"]


class TeacherUnavailable(ServerUnavailable):
    """A teacher elsewhere gave no usable response within its bounded wait; training saves a checkpoint and
    stops."""
