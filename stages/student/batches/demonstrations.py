"""Rows of ``demonstrations`` -> batches: what the distiller reads, and what the reader reads then.

The reader's sequence is a row's vectors and then ``input_ids``, the query with its answer, so
``positions_N`` are places in the flattened [B, Q] batch of queries alone. The token of the query
that a state predicts is the one the teacher's entry is about: both are found by the row's own
spans, and a row whose signal is about others is refused.

An encoder-decoder reads in two halves: ``encoder_ids_BE`` is what follows the vectors, and
``input_ids`` what its decoder reads, of which ``positions_N`` are places.

Dimensions: B = rows, L = tokens of the longest demonstrations, Q = of the longest query with its
answer (or what a decoder reads), E = of an encoder's longest text, N = scored positions of the
batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from schemas.dataset import CachedDataset, open_dataset
from schemas.errors import ConfigError
from schemas.scored_spans import SCORED, scored_targets
from schemas.tables.demonstrations import DEMONSTRATIONS
from stages.models.encoder_decoder.halves import (
    Frame,
    Ids,
    decoder_begins,
    decoder_spans,
    frame_of,
)
from stages.models.encoder_decoder.model import padded
from stages.student.batches.signals import Collator, Row, check_ids
from stages.student.distiller.distiller import Distiller
from stages.student.distiller.reader import window_of

Array = npt.NDArray[Any]


def distiller_tokens(row: Row) -> Array:
    """Return the demonstrations that a distiller reads."""
    tokens: Array = row["distiller_ids_L"]
    return tokens


@dataclass(frozen=True, slots=True)
class DemonstrationsCollator:
    """A batch of ``signals`` over queries, and the demonstrations beside it.

    With ``needs_answers`` a row without an answer is a ConfigError. ``tokens_of`` a row are its
    demonstrations: the distiller's. ``frame`` is that of a reader that is an encoder-decoder.
    """

    signals: Collator
    needs_answers: bool = False
    tokens_of: Callable[[Row], Array] = distiller_tokens
    frame: Frame | None = None

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the batch; see the module. ``in_answer_N`` marks tokens of answers."""
        if self.frame is None:
            batch: dict[str, Any] = {**self.signals([query_row(row) for row in rows])}
        else:
            rows = [_of_decoder(row) for row in rows]
            batch = {**self.signals([said_row(row, self.frame) for row in rows])}
            batch |= _encoder_texts(rows, self.frame)
        check_ids(rows, "distiller_ids_L", self.signals.vocab_size)
        shown = [self.tokens_of(row) for row in rows]
        lengths_B = np.array([len(ids_L) for ids_L in shown], np.int64)
        demonstration_ids_BL = np.zeros((len(rows), int(lengths_B.max())), np.int64)
        for b, row in enumerate(rows):
            demonstration_ids_BL[b, : lengths_B[b]] = shown[b]
            if self.needs_answers and row["answer_start"] >= len(row["input_ids_T"]):
                raise ConfigError(
                    f"sample {row['sample_id']} has no answer, as it was cut from a document, and "
                    f"objective 'mend' has answer_weight > 0: set it to 0, or train on episodes"
                )
        in_answer = [scored_targets(row) >= row["answer_start"] for row in rows]
        return batch | {
            "demonstration_ids_BL": torch.from_numpy(demonstration_ids_BL),
            "demonstration_lengths_B": torch.from_numpy(lengths_B),
            "in_answer_N": torch.from_numpy(np.concatenate(in_answer)),
        }


def check_rooms(distiller: Distiller, reader: PreTrainedModel, dataset: CachedDataset) -> None:
    """Raise ConfigError for a row that the distiller or the reader has no room for.

    Rows of all splits are looked at, before a step is spent.
    """
    tables = zip(dataset.manifests, dataset.folders, strict=True)
    (folder,) = [place for manifest, place in tables if manifest.table == DEMONSTRATIONS.name]
    rows = open_dataset([folder], verify=False)
    num_vectors, room, window = distiller.config.num_vectors, distiller.window, window_of(reader)
    frame = frame_of(reader.config)
    for index in range(len(rows)):
        row = rows[index]
        shown = len(row["distiller_ids_L"])
        asked = asked_length(row, frame, len(row["input_ids_T"]) - row["answer_start"])
        if room is not None and shown > room:
            raise ConfigError(
                f"sample {row['sample_id']} of {folder} has {shown} tokens of demonstrations, the "
                f"distiller has room for {room} before its {num_vectors} vectors: set "
                f"distiller_tokens of the step that made it to {room} or less"
            )
        if window is not None and num_vectors + asked > window:
            raise ConfigError(
                f"sample {row['sample_id']} of {folder} has a query of {asked} tokens, with "
                f"{num_vectors} vectors more than the reader's window of {window}: take fewer "
                f"vectors or shorter queries"
            )


def asked_length(row: Row, frame: Frame | None, answer_length: int) -> int:
    """Return how many tokens a reader reads together beside vectors: of an answer so long.

    Those of the query with the answer; of an encoder-decoder those of the longer half.
    """
    if frame is None:
        return int(row["answer_start"] - row["query_start"]) + answer_length
    said = max(answer_length, len(row["input_ids_T"]) - _begins(row))
    return max(len(_text_ids(row, frame)), said)


def said_row(row: Row, frame: Frame) -> dict[str, Any]:
    """Return the row as a decoder reads it: the start token and then what it says."""
    scored_targets(row)  # refuses a signal that is about other tokens than the decoder's
    moved_by = _begins(row) - 1
    moved = {
        "input_ids_T": frame.decoder_ids(row["input_ids_T"][_begins(row) :]),
        SCORED: row[SCORED] - moved_by,
    }
    if "first_target" in row:
        moved["first_target"] = row["first_target"] - moved_by
    return {**row, **moved}


def _of_decoder(row: Row) -> Row:
    """Return the row with those spans alone that a decoder says."""
    return {**row, SCORED: decoder_spans(row[SCORED], _begins(row))}


def _begins(row: Row) -> int:
    return decoder_begins(len(row["input_ids_T"]), row["query_start"], row["answer_start"])


def _text_ids(row: Row, frame: Frame) -> Ids:
    return frame.encoder_ids(row["input_ids_T"][row["query_start"] : _begins(row)])


def _encoder_texts(rows: Sequence[Row], frame: Frame) -> dict[str, torch.Tensor]:
    texts = [_text_ids(row, frame) for row in rows]
    lengths_B = torch.tensor([len(ids) for ids in texts])
    return {"encoder_ids_BE": padded(texts)[0], "encoder_lengths_B": lengths_B}


def query_row(row: Row) -> dict[str, Any]:
    """Return the row from its query's first token on: ids, spans and ``first_target``."""
    scored_targets(row)  # refuses a signal that is about other tokens than the row's spans
    start = int(row["query_start"])
    moved = {
        "input_ids_T": row["input_ids_T"][start:],
        SCORED: np.asarray(row[SCORED], np.int64) - start,
    }
    if "first_target" in row:
        moved["first_target"] = row["first_target"] - start
    return {**row, **moved}
