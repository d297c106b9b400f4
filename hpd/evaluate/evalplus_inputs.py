"""Types that MBPP+ inputs lose in JSON: which problems take tuples, sets or complex numbers, as EvalPlus restores them."""

from collections.abc import Callable
from typing import Any

Arguments = list[Any]


def restore_types(task_id: str, inputs: list[Arguments]) -> list[Arguments]:
    """The inputs of an MBPP+ problem as its reference expects them.

    >>> restore_types("Mbpp/2", [[[3, 4], [4, 5]]])
    [[(3, 4), (4, 5)]]
    """
    number = int(task_id.rpartition("/")[2])
    restore = next((function for function, numbers in _RESTORED.items() if number in numbers), list)
    return [list(restore(arguments)) for arguments in inputs]


def _tuples(arguments: Arguments) -> Arguments:
    return [tuple(argument) for argument in arguments]


def _lists_of_tuples(arguments: Arguments) -> Arguments:
    return [[tuple(item) for item in argument] for argument in arguments]


def _tuples_of_tuples(arguments: Arguments) -> Arguments:
    return [tuple(tuple(item) for item in argument) for argument in arguments]


def _tuples_of_some_tuples(arguments: Arguments) -> Arguments:
    return [tuple(tuple(item) if isinstance(item, list) else item for item in argument) for argument in arguments]


def _first_a_list_of_tuples(arguments: Arguments) -> Arguments:
    return [[tuple(item) for item in arguments[0]], *arguments[1:]]


def _first_a_tuple(arguments: Arguments) -> Arguments:
    return [tuple(arguments[0]), *arguments[1:]]


def _second_a_tuple(arguments: Arguments) -> Arguments:
    return [arguments[0], tuple(arguments[1]), *arguments[2:]]


def _list_of_sets(arguments: Arguments) -> Arguments:
    # The text of the problem calls them dictionaries, and an empty one is.
    return [[set(item) if isinstance(item, list) and item else {} for item in arguments[0]]]


def _real_and_complex(arguments: Arguments) -> Arguments:
    return [float(arguments[0]), complex(arguments[1])]


def _complex(arguments: Arguments) -> Arguments:
    return [complex(arguments[0])]


def _dict_of_tuples(arguments: Arguments) -> Arguments:
    return [{key: tuple(value) for key, value in arguments[0].items()}, *arguments[1:]]


def _all_tuples(arguments: Any) -> Any:
    return tuple(_all_tuples(item) for item in arguments) if isinstance(arguments, list) else arguments


# fmt: off
_RESTORED: dict[Callable[[Arguments], Any], set[int]] = {
    _tuples: {2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596, 616, 630, 726, 740, 744, 809},
    _lists_of_tuples: {63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780},
    _tuples_of_tuples: {259, 401, 445},
    _tuples_of_some_tuples: {278},
    _first_a_list_of_tuples: {75, 413, 444, 753},
    _first_a_tuple: {250, 307, 405, 446, 617, 720, 763, 808},
    _second_a_tuple: {106, 750},
    _list_of_sets: {115},
    _real_and_complex: {124},
    _complex: {252},
    _dict_of_tuples: {722},
    _all_tuples: {580, 615, 791},
}
# fmt: on
