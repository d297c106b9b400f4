"""DistillKit's rows of compressed log-probabilities: read as its own reader reads them, and written.

    input_ids            tokens of the row
    compressed_logprobs  bytes of each place: the first values whole, the coefficients of a curve through the
                         others, and in bins what is left, as codes of a few bits
    bytepacked_indices   bytes of each place: k token ids of ceil(log2 d) bits, high bit first

What the bytes mean is the compressor's configuration, which `distillkit` writes next to its files
(compression_config.yaml). Source: arcee-ai/DistillKit 1.0, distillkit/compression.

Axes: L places of a row, k tokens, b bytes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import yaml
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from hpd.teachers.foreign.rows import PlaceAnswers, TeacherFile, damaged, fit, read_columns

__all__ = ["CONFIG", "Bin", "Compressor", "DistillKitFile", "pack_bits", "unpack_bits"]

CONFIG = "compression_config.yaml"
_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_CURVES = {"sqrt": torch.sqrt, "exp": torch.exp}
_LEGACY = "packed_indices"


class Bin(NamedTuple):
    """A run of values behind the whole ones, each a code times the run's scale."""

    scale_dtype: str
    element_bits: int
    num_elements: int


class Compressor(NamedTuple):
    """What DistillKit's compressor was told; names and defaults are its own."""

    d: int
    """Tokens of the vocabulary: an id takes ceil(log2 d) bits."""
    k: int
    """Tokens a place."""
    exact_k: int
    """Values that are kept whole."""
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    """Powers of the place, or sqrt or exp of it."""
    term_dtype: str = "float32"
    residual_bins: tuple[Bin, ...] = ()
    delta_encoding: bool = True
    """A value is kept as its difference from the one before."""
    error_diffusion: bool = False
    """Concerns writing alone."""
    normalize_t: bool = False
    """Places are counted from 0 to 1 instead of by one."""

    @classmethod
    def read(cls, path: str | Path) -> Compressor:
        """The configuration in a YAML file, at its top or as `logprob_compressor` of DistillKit's own
        configuration.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not one.
        """
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(
                f"There is no {file}: it says what the compressed bytes mean. Give the compressor's "
                "configuration with --compressor FILE."
            )
        try:
            found: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())[:200]}.") from None
        if isinstance(found, dict):
            for name in ("teacher", "logprob_compressor"):
                found = found.get(name, found)
        if not isinstance(found, dict):
            raise ValueError(f"{file} is not a compressor's configuration: it needs d, k and exact_k.")
        return cls.of(found, str(file))

    @classmethod
    def of(cls, found: dict[str, Any], where: str) -> Compressor:
        """The configuration of these fields.

        Raises:
            ValueError: a field is unknown, missing or out of range; the text names it and `where`.
        """
        unknown = [str(name) for name in found if name not in cls._fields]
        if unknown or not all(name in found for name in ("d", "k", "exact_k")):
            raise ValueError(
                f"{where} is not a compressor's configuration: it needs d, k and exact_k, may have "
                f"{', '.join(cls._fields[3:])}, and has {', '.join(map(str, found)) or 'nothing'}."
            )
        try:
            bins = tuple(
                Bin(str(part["scale_dtype"]), int(part["element_bits"]), int(part["num_elements"]))
                for part in found.get("residual_bins") or ()
            )
        except (TypeError, KeyError, ValueError):
            raise ValueError(
                f"{where}: each of residual_bins has scale_dtype, element_bits and num_elements."
            ) from None
        terms = tuple(found.get("polynomial_terms") or ())
        made = cls(**{**found, "residual_bins": bins, "polynomial_terms": terms})
        if problem := made._problem():
            raise ValueError(f"{where}: {problem}.")
        return made

    def _problem(self) -> str | None:
        dtypes = (self.exact_dtype, self.term_dtype, *(part.scale_dtype for part in self.residual_bins))
        if wrong := [name for name in dtypes if name not in _DTYPES]:
            return f"{wrong[0]!r} is not a dtype: {', '.join(_DTYPES)}"
        numbers = (self.d, self.k, self.exact_k)
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
            return f"d, k and exact_k are whole numbers, got {numbers}"
        if not 0 <= self.exact_k <= self.k <= self.d or self.k < 1:
            return f"0 <= exact_k <= k <= d and k >= 1 are needed, got {self.exact_k}, {self.k}, {self.d}"
        if not all(isinstance(t, int) or t in _CURVES for t in self.polynomial_terms):
            return f"polynomial_terms are whole numbers, sqrt or exp, got {list(self.polynomial_terms)}"
        if any(not 1 <= part.element_bits <= 64 or part.num_elements < 1 for part in self.residual_bins):
            return "residual_bins have 1 to 64 element_bits and at least one of num_elements"
        if self.exact_k < self.k and not (self.polynomial_terms or self.residual_bins):
            return "exact_k < k needs polynomial_terms or residual_bins, which say the other values"
        if sum(part.num_elements for part in self.residual_bins) > self.k - self.exact_k:
            return "residual_bins hold more values than k - exact_k"
        return None

    @property
    def dtype(self) -> torch.dtype:
        """What the values are read as: a curve of a wider dtype widens all of them, differences excepted."""
        exact = _DTYPES[self.exact_dtype]
        if self.delta_encoding or not self.polynomial_terms:
            return exact
        return torch.promote_types(exact, _DTYPES[self.term_dtype])

    @property
    def index_bits(self) -> int:
        """Bits of a token id."""
        # In float32, as DistillKit counts: just above a power of two of 2^24 or more it would be one less.
        return math.ceil(float(torch.log2(torch.tensor(self.d, dtype=torch.float32))))

    @property
    def logprob_bytes(self) -> int:
        """Bytes of a place's values."""
        size = self.exact_k * _DTYPES[self.exact_dtype].itemsize
        size += len(self.polynomial_terms) * _DTYPES[self.term_dtype].itemsize
        return size + sum(
            _DTYPES[part.scale_dtype].itemsize + -(-part.element_bits * part.num_elements // 8)
            for part in self.residual_bins
        )

    @property
    def index_bytes(self) -> int:
        """Bytes of a place's token ids."""
        return -(-self.index_bits * self.k // 8)

    def values(self, packed: UInt8[Tensor, "L b"]) -> Float[Tensor, "L k"]:
        """Log-probabilities, in nats, likeliest first, bit for bit those of DistillKit's reader."""
        parts, whole = _Bytes(packed), _DTYPES[self.exact_dtype]
        exact = parts.take(whole, self.exact_k)
        curve = parts.take(_DTYPES[self.term_dtype], len(self.polynomial_terms))
        rest = self.k - self.exact_k
        others, first = packed.new_zeros(len(packed), rest, dtype=whole), 0
        for part in self.residual_bins:
            scale = parts.take(_DTYPES[part.scale_dtype], 1)
            codes = parts.codes(part.element_bits, part.num_elements)
            others[:, first : first + part.num_elements] = _decode(codes, part.element_bits) * scale
            first += part.num_elements
        if self.polynomial_terms:
            others = (self._powers(rest) * curve.unsqueeze(-2)).sum(-1) + others
        values = torch.cat([exact, others], dim=-1)
        return values.float().cumsum(-1).to(whole) if self.delta_encoding else values

    def _powers(self, count: int) -> Float[Tensor, "k t"]:
        dtype = _DTYPES[self.term_dtype]
        places = (
            torch.linspace(0, 1, count, dtype=dtype) if self.normalize_t else torch.arange(count, dtype=dtype)
        )
        return torch.stack(
            [places**t if isinstance(t, int) else _CURVES[t](places) for t in self.polynomial_terms], dim=-1
        )


def _decode(codes: Int[Tensor, "L n"], bits: int) -> Float[Tensor, "L n"]:
    """One bit is a sign; more are a number around zero."""
    if bits == 1:
        return codes.float() * 2.0 - 1.0
    return (codes - 2 ** (bits - 1)).float()


class _Bytes:
    """The bytes of each place, taken from the front."""

    def __init__(self, packed: UInt8[Tensor, "L b"]):
        self._packed, self._at = packed, 0

    def _next(self, size: int) -> UInt8[Tensor, "L n"]:
        part = self._packed[:, self._at : self._at + size].contiguous()
        self._at += size
        return part

    def take(self, dtype: torch.dtype, count: int) -> Float[Tensor, "L n"]:
        if not count:
            return self._packed.new_empty(len(self._packed), 0, dtype=dtype)
        return self._next(count * dtype.itemsize).view(dtype)

    def codes(self, bits: int, count: int) -> Int[Tensor, "L n"]:
        return unpack_bits(self._next(-(-bits * count // 8)), bits, count)


def pack_bits(numbers: Int[Tensor, "L n"], bits: int) -> UInt8[Tensor, "L b"]:
    """Numbers of so many bits one behind the other, high bit first, filled up with zeros to whole bytes."""
    places = torch.arange(bits - 1, -1, -1)
    found = ((numbers[..., None] >> places) & 1).flatten(1).to(torch.uint8)
    return torch.from_numpy(np.packbits(found.numpy(), axis=1))


def unpack_bits(packed: UInt8[Tensor, "L b"], bits: int, count: int) -> Int[Tensor, "L n"]:
    """The inverse of `pack_bits`."""
    found = np.unpackbits(packed.contiguous().numpy(), axis=1)[:, : bits * count]
    powers = 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
    return torch.from_numpy(found.reshape(len(found), count, bits) @ powers)


class DistillKitFile(TeacherFile):
    """Rows as `distillkit` samples them from a teacher.

    Args:
        path: a file, a folder or a Hub id.
        config: the compressor's; None: `compression_config.yaml` next to the files.

    Raises:
        FileNotFoundError, ValueError: no rows, no configuration, or rows of another format.
    """

    def __init__(self, path: str, config: Compressor | None = None):
        self.path = path
        self._rows = read_columns(path, ("input_ids",), "DistillKit")
        if _LEGACY in self._rows.column_names:
            raise ValueError(
                f"{path} holds rows of DistillKit's former compressor (packed_indices): those are logits "
                "around their mean, whose sum is not known. Capture them again with DistillKit 1.0."
            )
        self._rows = read_columns(
            path, ("input_ids", "compressed_logprobs", "bytepacked_indices"), "DistillKit"
        ).with_format("numpy")
        self.config = config or Compressor.read(_folder(path) / CONFIG)
        if self.config.dtype == torch.float64:
            raise ValueError("Values of float64 are wider than a cache's, which have 32 bits or 16.")
        self.k, self.dtype = self.config.k, self.config.dtype

    def __len__(self) -> int:
        return len(self._rows)

    def ids(self, number: int) -> npt.NDArray[np.int64]:
        return np.asarray(self._rows.select_columns("input_ids")[number]["input_ids"]).astype(np.int64)

    def answers(self, number: int) -> PlaceAnswers:
        row = self._rows[number]
        found = []
        for name, width in (
            ("compressed_logprobs", self.config.logprob_bytes),
            ("bytepacked_indices", self.config.index_bytes),
        ):
            try:
                packed = np.stack(list(row[name])) if len(row[name]) else np.empty((0, width))
                here = packed.shape[1]
            except (ValueError, IndexError, TypeError):
                raise damaged(self.path, number, f"its {name} are not the bytes of places") from None
            if here != width:
                raise ValueError(
                    f"Row {number + 1:,} of {self.path} has {here} bytes of {name} a place, and the "
                    f"compressor's configuration (d {self.config.d}, k {self.config.k}) makes {width}: it "
                    "is that of other files, or the file is damaged."
                )
            found.append(torch.from_numpy(packed.astype(np.uint8)))
        values = self.config.values(found[0])
        if (none := values == -torch.inf).any():
            # Of fewer tokens than k its writer makes -inf, and differences of -inf are no numbers.
            values = torch.where(none.cumsum(-1) > 0, -torch.inf, values)
        tokens = unpack_bits(found[1], self.config.index_bits, self.k)
        fit(tokens, values, self.path, number)
        length = len(row["input_ids"])
        if not length - 1 <= len(values) <= length:
            raise damaged(self.path, number, f"it has {length} tokens and {len(values)} places")
        return PlaceAnswers(tokens, values, None, torch.ones(len(values), dtype=torch.bool))

    def digest(self) -> str:
        return f"{self._rows._fingerprint} {self.config}"


def _folder(path: str) -> Path:
    place = Path(path).expanduser()
    return place if place.is_dir() else place.parent
