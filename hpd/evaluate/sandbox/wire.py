"""Messages between two sandboxed processes: plain data as JSON, everything else by reference.

Runs inside the sandbox, so it imports the standard library only. Nothing received is ever executed or
unpickled: `decode` builds exact built-in types, so a value of the program cannot bring an `__eq__` of its own
    to the tests.

A program's process answers requests (`serve`); the tests hold a `Remote` for each of its objects that is not
plain data.
"""

import builtins
import datetime
import hashlib
import itertools
import json
import operator
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_MESSAGE_BYTES = 64 * 2**20
LARGE_CHARS = 2**18
"""Answers that are longer stay with the program where the tests ask for them by digest (`by_digest`)."""
_LARGE = 1  # the place of the latest of them among the program's objects
_LENGTH = struct.Struct("<I")
_MAX_PLAIN_INTEGER = (
    2**63
)  # larger ones travel in hexadecimal: decimal conversion is quadratic and limited by Python

Reference = Callable[[Any], int]
Dereference = Callable[[int], Any]


class RemoteError(Exception):
    """The program raised an exception that is not a built-in one, or ended while it was asked."""


def encode(value: Any, reference: Reference | None = None) -> Any:
    """JSON form of a value; what is not plain data becomes ``{"h": reference(value)}``.

    Raises:
        TypeError: something is not plain data and `reference` is None.
    """
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if kind is int:
        return value if abs(value) < _MAX_PLAIN_INTEGER else {"i": hex(value)}
    if kind is list:
        return [encode(item, reference) for item in value]
    if kind is type and value in _TYPES.values():
        return {"C": value.__name__}
    if kind in _ENCODERS:
        tag, parts = _ENCODERS[kind]
        return {tag: encode(parts(value), reference)}
    for base, plain in _PLAIN.items():
        if isinstance(value, base):  # a named tuple, a counter, an enumeration: the data of its base
            return encode(plain(value), reference)
    if reference is None:
        raise TypeError(f"a {kind.__name__} is not plain data and cannot leave the sandbox")
    return {"h": reference(value)}


def decode(form: Any, dereference: Dereference | None = None) -> Any:
    """The value of a JSON form: exact built-in types, or what `dereference` gives for a reference."""
    if isinstance(form, list):
        return [decode(item, dereference) for item in form]
    if not isinstance(form, dict):
        return form
    ((tag, parts),) = form.items()
    if tag == "h" and dereference is not None:
        return dereference(int(parts))
    return _DECODERS[tag](decode(parts, dereference))


def send(fd: int, message: Any) -> None:
    """Write one message.

    Raises:
        ValueError: it is longer than `MAX_MESSAGE_BYTES`.
    """
    content = json.dumps(message).encode()
    if len(content) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(content)} bytes is too long")
    content = memoryview(_LENGTH.pack(len(content)) + content)
    while content:
        content = content[os.write(fd, content) :]


def receive(fd: int) -> Any:
    """Read one message.

    Raises:
        EOFError: the other side is gone.
        ValueError: the message is too long or no JSON.
    """
    (length,) = _LENGTH.unpack(_read_exactly(fd, _LENGTH.size))
    if length > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {length} bytes is too long")
    return json.loads(_read_exactly(fd, length))


def serve(namespace: Any, read_fd: int, write_fd: int) -> None:
    """Answer requests about the objects of a program until the tests are done."""
    objects: list[Any] = [namespace, None]
    numbers: dict[int, int] = {id(namespace): 0}

    def reference(value: Any) -> int:
        if id(value) not in numbers:  # `objects` keeps the value alive, so its id stays its own
            numbers[id(value)] = len(objects)
            objects.append(value)
        return numbers[id(value)]

    while True:
        try:
            operation, args, kwargs = receive(read_fd)
        except EOFError:
            return
        try:
            given = [decode(arg, objects.__getitem__) for arg in args]
            options = {name: decode(arg, objects.__getitem__) for name, arg in kwargs.items()}
            value = _OPERATIONS[operation](*given, **options)
            mark = digest(value) if operation == "large call" and size(value) > LARGE_CHARS else None
            if mark is not None:
                objects[_LARGE] = value
                reply = {"large": [_LARGE, mark]}
            else:
                reply = {"value": encode(value, reference)}
        except Exception as error:
            reply = {"error": [type(error).__name__, str(error)[:500]]}
        try:
            send(write_fd, reply)
        except ValueError as error:  # too long: the tests may go on
            send(write_fd, {"error": ["ValueError", str(error)]})


class Remote:
    """An object of the program, from the side of the tests. Equal only to itself: its own `__eq__` is never
    asked."""

    __slots__ = ("_ask", "_number")

    def __init__(self, ask: Callable[..., Any], number: int) -> None:
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask("call", self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("getitem", self, key)

    def __len__(self) -> int:
        return self._ask("len", self)

    def __bool__(self) -> bool:
        return self._ask("bool", self) is True

    def __str__(self) -> str:
        return str(self._ask("str", self))

    def __repr__(self) -> str:
        return str(self._ask("repr", self))

    def __iter__(self) -> Iterator[Any]:
        iterator = self._ask("iter", self)
        while True:
            try:
                item = self._ask("next", iterator)
            except StopIteration:
                return
            yield item

    def __next__(self) -> Any:
        return self._ask("next", self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and self._number == other._number

    def __hash__(self) -> int:
        return hash(self._number)


class Large(Remote):
    """A long answer that stayed with the program, until its next one. The digest is the program's word: one
    that is the right answer's shows that the program has that answer."""

    __slots__ = ("digest",)

    def __init__(self, ask: Callable[..., Any], number: int, mark: str) -> None:
        super().__init__(ask, number)
        object.__setattr__(self, "digest", mark)


def by_digest(function: Remote) -> Callable[..., Any]:
    """A function of the program whose long answers come as `Large`."""
    return lambda *args: function._ask("large call", function, *args)


def value_of(answer: Any) -> Any:
    """An answer itself.

    Raises:
        RemoteError: it is longer than a message may be.
    """
    return answer._ask("value", answer) if isinstance(answer, Large) else answer


def digest(value: Any) -> str | None:
    """A digest of how a value prints, item by item, so that it needs no second copy; None where it does not
    print."""
    if isinstance(value, Large):
        return value.digest
    found = hashlib.sha256(type(value).__name__.encode())
    try:
        for item in value if type(value) in (list, tuple) else [value]:
            found.update(repr(item).encode("utf-8", "surrogatepass") + b"\n")
    except Exception:  # an integer beyond Python's limit of decimal digits, or an object's own repr
        return None
    return found.hexdigest()


def size(value: Any) -> int:
    """About the characters of a value as text, counted up to a little above `LARGE_CHARS`."""
    if isinstance(value, Large):
        return 16 * LARGE_CHARS
    total, todo = 0, [value]
    while todo and total <= LARGE_CHARS:
        item = todo.pop()
        total += 8
        if isinstance(item, (str, bytes)):
            total += len(item)
        elif isinstance(item, int):
            total += item.bit_length() // 4
        elif isinstance(item, dict):
            todo += itertools.islice(itertools.chain(item.keys(), item.values()), LARGE_CHARS)
        elif isinstance(item, (list, tuple, set, frozenset)):
            todo += itertools.islice(item, LARGE_CHARS)
    return total


def connect(read_fd: int, write_fd: int) -> Remote:
    """The namespace of the program that `serve` runs for at the other end."""

    def number_of(value: Any) -> int:
        if isinstance(value, Remote):
            return value._number
        raise TypeError(f"a test cannot pass a {type(value).__name__} to the program: it is not plain data")

    def ask(operation: str, *args: Any, **kwargs: Any) -> Any:
        options = {name: encode(value, number_of) for name, value in kwargs.items()}
        try:
            send(write_fd, [operation, [encode(value, number_of) for value in args], options])
            reply = receive(read_fd)
        except (EOFError, BrokenPipeError) as error:
            raise RemoteError("the program ended before it answered") from error
        if "error" in reply:
            name, message = reply["error"]
            raise _exception(str(name), str(message))
        if "large" in reply:
            number, mark = reply["large"]
            return Large(ask, int(number), str(mark))
        return decode(reply["value"], lambda number: Remote(ask, number))

    return Remote(ask, 0)


def _exception(name: str, message: str) -> Exception:
    kind = getattr(builtins, name, None)
    if (
        isinstance(kind, type)
        and issubclass(kind, Exception)
        and kind not in (UnicodeDecodeError, UnicodeEncodeError)
    ):
        try:
            return kind(message)
        except TypeError:  # built-in exceptions that want more than a message
            pass
    return RemoteError(f"{name}: {message}")


def _read_exactly(fd: int, count: int) -> bytes:
    parts = []
    while count:
        part = os.read(fd, min(count, 2**20))
        if not part:
            raise EOFError("the other side is gone")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *args, **kwargs: function(*args, **kwargs),
    "large call": lambda function, *args: function(*args),
    "value": lambda value: value,
    "getattr": getattr,
    "setattr": setattr,
    "getitem": operator.getitem,
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
    "repr": repr,
}

# By the base's own methods: a subclass may have changed how it prints or iterates.
_PLAIN: dict[type, Callable[[Any], Any]] = {
    int: int.__int__,
    float: float.__float__,
    str: str.__str__,
    tuple: lambda value: tuple(tuple.__iter__(value)),
    list: lambda value: list(list.__iter__(value)),
    dict: lambda value: dict(dict.items(value)),
    set: lambda value: set(set.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
}

# What a test may pass or expect as a type.
_TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, type(None))
}

_ENCODERS: dict[type, tuple[str, Callable[[Any], Any]]] = {
    tuple: ("t", list),
    set: ("s", list),
    frozenset: ("z", list),
    dict: ("d", lambda value: [[key, item] for key, item in value.items()]),
    type({}.keys()): ("k", list),
    type({}.items()): ("m", lambda value: [list(pair) for pair in value]),
    bytes: ("b", bytes.hex),
    bytearray: ("y", bytearray.hex),
    complex: ("c", lambda value: [value.real, value.imag]),
    range: ("r", lambda value: [value.start, value.stop, value.step]),
    deque: ("q", list),
    Decimal: ("D", str),
    Fraction: ("F", lambda value: [value.numerator, value.denominator]),
    datetime.datetime: ("T", datetime.datetime.isoformat),
    datetime.date: ("A", datetime.date.isoformat),
}

_DECODERS: dict[str, Callable[[Any], Any]] = {
    "i": lambda text: int(text, 16),
    "t": tuple,
    "s": set,
    "z": frozenset,
    "d": dict,
    "k": lambda keys: dict.fromkeys(keys).keys(),
    "m": lambda pairs: dict(pairs).items(),
    "b": bytes.fromhex,
    "y": bytearray.fromhex,
    "c": lambda parts: complex(*parts),
    "r": lambda parts: range(*parts),
    "q": deque,
    "D": Decimal,
    "F": lambda parts: Fraction(*parts),
    "C": _TYPES.__getitem__,
    "T": datetime.datetime.fromisoformat,
    "A": datetime.date.fromisoformat,
}
