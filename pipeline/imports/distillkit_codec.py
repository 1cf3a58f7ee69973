"""DistillKit's compressed distributions, read: packed ids, and log-probs in up to four parts.

Bytes of a position, as its commit a61c2e7 lays them (``compression/monotonic_logprobs.py``): the
``exact_k`` first values as numbers; the coefficients of a fit to the others; then for each bin a
scale and integers packed to ``element_bits``, which times the scale are what the fit leaves. With
``delta_encoding`` all of that is differences, the first value itself. Ids are packed by themselves
to the bits that ``d`` needs, the highest bit first; numbers are little-endian.

Its reader computes in the types of its parts; here all is float64 between roundings to them, so a
value may be off by one step of ``exact_dtype``, or by some of a ``term_dtype`` of 16 bits.

Dimensions: E = entries of a row, K = kept tokens, A = those of them that are fitted, B = bytes.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import yaml
from pydantic import BaseModel, Field, ValidationError

from schemas.errors import ConfigError, first_line
from stages.sources.reading.rejects import MalformedRecord

Array = npt.NDArray[Any]
CONFIG = "compression_config.yaml"  # its sampler leaves it beside the rows
Dtype = Literal["float16", "bfloat16", "float32", "float64"]
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class _Bin(BaseModel):
    scale_dtype: Dtype
    element_bits: int = Field(ge=1, le=64)
    num_elements: int = Field(ge=1)

    @property
    def num_bytes(self) -> int:
        return (self.element_bits * self.num_elements + 7) // 8


class Codec(BaseModel):
    """The settings of a compression, with the names and defaults that DistillKit gives them."""

    d: int = Field(ge=1)
    k: int = Field(ge=1)
    exact_k: int = Field(ge=0)
    exact_dtype: Dtype = "float32"
    polynomial_terms: list[int | Literal["sqrt", "exp"]] | None = None
    term_dtype: Dtype = "float32"
    residual_bins: list[_Bin]
    delta_encoding: bool = True
    normalize_t: bool = False

    @classmethod
    def read(cls, path: Path) -> "Codec":
        """Read ``compression_config.yaml``; raises ConfigError where it is missing or another."""
        if not path.is_file():
            raise ConfigError(
                f"{path} does not exist: compressed rows are read by the settings that DistillKit "
                f"leaves beside them, put that file there"
            )
        try:
            found = cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, yaml.YAMLError, ValidationError) as error:
            raise ConfigError(
                f"cannot read {path}: {first_line(error)}; expected the settings that DistillKit "
                f"writes there"
            ) from error
        num_fitted = found.k - found.exact_k
        if num_fitted < 0 or sum(bin_.num_elements for bin_ in found.residual_bins) > num_fitted:
            raise ConfigError(
                f"{path}: k is {found.k}, exact_k {found.exact_k}, the bins hold "
                f"{sum(bin_.num_elements for bin_ in found.residual_bins)}: expected exact_k and "
                f"bins together of at most k"
            )
        return found

    @property
    def id_bits(self) -> int:
        """Bits of a packed id."""
        return int(np.ceil(np.log2(np.float32(self.d))))

    @property
    def num_bytes(self) -> int:
        """Bytes of the log-probs of a position."""
        terms = len(self.polynomial_terms or ()) * _BYTES[self.term_dtype]
        bins = sum(_BYTES[bin_.scale_dtype] + bin_.num_bytes for bin_ in self.residual_bins)
        return self.exact_k * _BYTES[self.exact_dtype] + terms + bins

    def entries(self, ids_EB: Array, logprobs_EB: Array) -> tuple[Array, Array]:
        """Return ids (int64) and log-probs (float64) [E, K]; raises MalformedRecord."""
        expected = (self.k * self.id_bits + 7) // 8, self.num_bytes
        found = ids_EB.shape[1], logprobs_EB.shape[1]
        if len(ids_EB) != len(logprobs_EB) or (len(ids_EB) and found != expected):
            raise MalformedRecord(
                "compressed bytes of another length",
                f"{len(ids_EB)} and {len(logprobs_EB)} entries of {found[0]} and {found[1]} bytes, "
                f"{CONFIG} makes {expected[0]} and {expected[1]}",
            )
        return _unpacked(ids_EB, self.id_bits, self.k), self._logprobs(logprobs_EB)

    def _logprobs(self, bytes_EB: Array) -> Array:
        exact_EX, left_EB = _numbers(bytes_EB, self.exact_dtype, self.exact_k)
        num_fitted = self.k - self.exact_k
        terms = self.polynomial_terms or []
        coefficients_EC, left_EB = _numbers(left_EB, self.term_dtype, len(terms))
        residual_EA = np.zeros((len(bytes_EB), num_fitted))
        start = 0
        for bin_ in self.residual_bins:
            scale_E1, left_EB = _numbers(left_EB, bin_.scale_dtype, 1)
            packed_EB, left_EB = left_EB[:, : bin_.num_bytes], left_EB[:, bin_.num_bytes :]
            codes_EN = _unpacked(packed_EB, bin_.element_bits, bin_.num_elements)
            stop = start + bin_.num_elements
            residual_EA[:, start:stop] = _centred(codes_EN, bin_.element_bits) * scale_E1
            start = stop
        residual_EA = _rounded(residual_EA, self.exact_dtype)
        if terms:
            powers_AC = _rounded(self._powers(num_fitted, terms), self.term_dtype)
            products_EAC = _rounded(powers_AC * coefficients_EC[:, None], self.term_dtype)
            residual_EA = _rounded(products_EAC.sum(axis=2), self.term_dtype) + residual_EA
        values_EK = _rounded(np.concatenate([exact_EX, residual_EA], axis=1), self.exact_dtype)
        if not self.delta_encoding:
            return values_EK
        return _rounded(np.cumsum(values_EK.astype(np.float32), axis=1), self.exact_dtype)

    def _powers(self, num: int, terms: list[int | Literal["sqrt", "exp"]]) -> Array:
        places_A = np.linspace(0, 1, num) if self.normalize_t else np.arange(num)
        places_A = _rounded(places_A, self.term_dtype)
        functions = {"sqrt": np.sqrt, "exp": np.exp}
        columns = [
            functions[term](places_A) if isinstance(term, str) else places_A**term for term in terms
        ]
        return np.stack(columns, axis=-1)


def _numbers(bytes_EB: Array, dtype: Dtype, count: int) -> tuple[Array, Array]:
    """Return the first numbers [E, count] as float64, and the bytes after them."""
    if not count:
        return np.zeros((len(bytes_EB), 0)), bytes_EB
    size = count * _BYTES[dtype]
    first_EB = np.ascontiguousarray(bytes_EB[:, :size])
    if dtype == "bfloat16":
        values = (first_EB.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = first_EB.view(np.dtype(dtype).newbyteorder("<"))
    return values.reshape(len(bytes_EB), count).astype(np.float64), bytes_EB[:, size:]


def _unpacked(bytes_EB: Array, num_bits: int, count: int) -> Array:
    bits_EN = np.unpackbits(np.ascontiguousarray(bytes_EB), axis=1, count=count * num_bits)
    weights = 1 << np.arange(num_bits - 1, -1, -1, dtype=np.int64)
    return np.asarray(bits_EN.reshape(len(bytes_EB), count, num_bits) @ weights)


def _centred(codes: Array, num_bits: int) -> Array:
    return codes * 2.0 - 1.0 if num_bits == 1 else codes - 2.0 ** (num_bits - 1)


def _rounded(values: Array, dtype: Dtype) -> Array:
    """Return float64 values as the nearest ones of ``dtype``, ties to even."""
    if dtype != "bfloat16":
        return np.asarray(values, dtype).astype(np.float64)
    bits = np.asarray(values, np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return nearest.astype(np.uint32).view(np.float32).astype(np.float64)
