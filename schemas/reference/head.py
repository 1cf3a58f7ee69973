"""The language-model head beside an ``exact`` table: cached hidden states to the teacher's logits.

``logits = softcap * tanh((W h + b) * scale / softcap)``, or without the capping
``(W h + b) * scale``. Hidden states are rounded to the head's own type first, as the model rounds
them; all else is float32.

Dimensions: N = positions, D = hidden width, U = the teacher's vocabulary.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import StoreError

Array = npt.NDArray[Any]
F32Array = npt.NDArray[np.float32]
_STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True, slots=True)
class Head:
    """``stored`` is the type of the weights in the file, as safetensors calls it."""

    weight_UD: F32Array
    bias_U: F32Array | None
    scale: float
    softcap: float | None
    stored: str

    def logits(self, hidden_ND: Array) -> F32Array:
        """Return the teacher's logits [N, U]; a block of positions at a time keeps them small."""
        logits_NU: F32Array = _rounded(hidden_ND, self.stored) @ self.weight_UD.T
        if self.bias_U is not None:
            logits_NU = logits_NU + self.bias_U
        logits_NU = logits_NU * np.float32(self.scale)
        if self.softcap is None:
            return logits_NU
        softcap = np.float32(self.softcap)
        return np.asarray(np.tanh(logits_NU / softcap) * softcap, np.float32)


def read_head(folder: Path) -> Head:
    """Read ``head.safetensors`` and ``head.json`` (``CachedDataset.local_folder`` has them).

    Raises StoreError where they are not what ``teacher_logits`` writes.
    """
    try:
        settings = json.loads((folder / "head.json").read_text())
        tensors = _tensors((folder / "head.safetensors").read_bytes())
        (weight_UD, stored), bias = tensors["weight"], tensors.get("bias")
        bias_U = None if bias is None else bias[0]
        return Head(weight_UD, bias_U, settings["scale"], settings["softcap"], stored)
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(
            f"cannot read the language-model head in {folder} ({error}): expected "
            f"head.safetensors and head.json; run `teachercache verify` on the table"
        ) from error


def _tensors(content: bytes) -> dict[str, tuple[F32Array, str]]:
    """Return each tensor of a safetensors file in float32, and its type there."""
    start = 8 + int.from_bytes(content[:8], "little")
    found = {}
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            first, end = (start + offset for offset in entry["data_offsets"])
            values = np.frombuffer(content[first:end], _STORED[entry["dtype"]])
            wide = _widened(values, entry["dtype"]).reshape(entry["shape"])
            found[name] = wide, entry["dtype"]
    return found


def _widened(values: Array, stored: str) -> F32Array:
    if stored == "BF16":  # the upper half of a float32
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32)


def _rounded(values: Array, stored: str) -> F32Array:
    """Round to a type and back to float32: to nearest, ties to even."""
    wide = np.ascontiguousarray(values, np.float32)
    if stored == "F16":
        return wide.astype(np.float16).astype(np.float32)
    if stored != "BF16":
        return wide
    bits = wide.view(np.uint32)
    to_nearest = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    kept = (bits + to_nearest) & np.uint32(0xFFFF0000)
    return kept.view(np.float32)
