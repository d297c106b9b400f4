"""The error of a teacher that gives no answer."""

from hpd.http import ServerUnavailable

__all__ = ["TeacherUnavailable"]


class TeacherUnavailable(ServerUnavailable):
    """A teacher elsewhere gave no usable response within its bounded wait, or the files of a cached one are
    damaged; training saves a checkpoint and stops."""
