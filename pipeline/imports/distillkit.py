"""Format ``distillkit``: the rows that DistillKit 1.0 captures, packs and trains on.

Of the forms that its reader knows (commit a61c2e7, ``compression/compressor.py``) these are the raw
one, ``token_ids`` and ``top_values``, and the compressed one. Entry t is about token t + 1: its
capture leaves out the first token's empty entry, so a row has one entry less than tokens; packing
drops the last token instead, and then the last entry of a text is about a token that is not there
and is left out. Entries count where ``labels``, if there are any, are not negative.

Dimensions: T = tokens of a row, E = entries, K = kept tokens.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.imports.distillkit_codec import CONFIG, Codec
from pipeline.imports.parts import parts_of
from pipeline.imports.peer import Peer
from pipeline.imports.peer_files import PeerFile, array_of, require_columns
from pipeline.imports.peer_row import PeerRow
from schemas.errors import ConfigError
from stages.sources.reading.rejects import MalformedRecord

Array = npt.NDArray[Any]
RAW = ("token_ids", "top_values")
COMPRESSED = ("bytepacked_indices", "compressed_logprobs")
_OPTIONAL = {"labels", "attention_mask"}


class DistillKit(Peer):
    """Raw top-k columns, or compressed ones beside the settings that they were compressed by."""

    is_renormalised = False

    def __init__(self, folder: Path, files: list[PeerFile]) -> None:
        """Find out the form; raises ConfigError for another one."""
        names = set(files[0].schema.names)
        if {"packed_indices", "coeffs"} <= names:
            raise ConfigError(
                f"{files[0].path} has DistillKit's older compressed form (packed_indices, coeffs), "
                f"which holds centred logits and no log-probs: capture the rows again with its "
                f"present version"
            )
        is_compressed = set(COMPRESSED) <= names
        self.entries = COMPRESSED if is_compressed else RAW
        self.codec = Codec.read(folder / CONFIG) if is_compressed else None
        for file in files:
            require_columns(file, ("input_ids", *self.entries), "DistillKit")

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the compression, if there is one."""
        return {} if self.codec is None else self.codec.model_dump(mode="json")

    def columns(self, schema: pa.Schema) -> list[str]:
        """Return the columns to read."""
        return ["input_ids", *self.entries, *sorted(_OPTIONAL & set(schema.names))]

    def leaves_out(self, labels: list[Array]) -> bool:
        """Whether an entry before a row's last token is not to count."""
        return any(bool((labels_T[:-1] < 0).any()) for labels_T in labels)

    def rows(self, record: Mapping[str, pa.Scalar]) -> list[PeerRow]:
        """Return a row for each text of the record; raises MalformedRecord."""
        ids_T = array_of(record["input_ids"], "input_ids", np.int64)
        ids_EK, logprobs_EK = self._entries(record)
        parts = parts_of(record, len(ids_T))
        num_entries = len(ids_EK)
        if num_entries != len(ids_T) and (num_entries != len(ids_T) - 1 or len(parts) != 1):
            raise MalformedRecord(
                "columns of unequal lengths",
                f"{num_entries} entries for {len(ids_T)} input_ids, expected as many or one less",
            )
        counts_T = np.ones(len(ids_T), bool)
        if "labels" in record:
            labels_T = array_of(record["labels"], "labels", np.int64)
            if not num_entries <= len(labels_T) <= len(ids_T):
                raise MalformedRecord(
                    "columns of unequal lengths", f"{len(labels_T)} labels, {len(ids_T)} input_ids"
                )
            counts_T[: len(labels_T)] = labels_T >= 0
        found = []
        for part in parts:
            places_P = np.arange(part.start, min(part.stop - 1, num_entries))
            places_P = places_P[counts_T[places_P]]
            kept = ids_EK[places_P], logprobs_EK[places_P]
            targets_P = places_P + 1 - part.start
            found.append(PeerRow(ids_T[part], targets_P, *kept, self.codec is not None))
        return found

    def _entries(self, record: Mapping[str, pa.Scalar]) -> tuple[Array, Array]:
        ids, values = self.entries
        if self.codec is not None:
            return self.codec.entries(*(_bytes(record[name], name) for name in (ids, values)))
        ids_EK = array_of(record[ids], ids, np.int64)
        logprobs_EK = array_of(record[values], values, np.float64)
        if ids_EK.shape != logprobs_EK.shape:
            raise MalformedRecord(
                "columns of unequal lengths",
                f"token_ids {ids_EK.shape}, top_values {logprobs_EK.shape}",
            )
        return ids_EK, logprobs_EK


def _bytes(values: pa.Scalar, name: str) -> Array:
    found_EB = array_of(values, name, np.int64)
    if found_EB.ndim != 2 or (found_EB != (found_EB & 255)).any():
        raise MalformedRecord("compressed bytes that are none", f"{name} holds no lists of bytes")
    return found_EB.astype(np.uint8)
