"""One bounded HTTP exchange: the client of teachers and judges."""

from hpd.http.checks import BadResponse, check_url, clean_key, read_json, read_key, shown, without_key
from hpd.http.connection import Connection, ServerUnavailable

__all__ = [
    "BadResponse",
    "Connection",
    "ServerUnavailable",
    "check_url",
    "clean_key",
    "read_json",
    "read_key",
    "shown",
    "without_key",
]
