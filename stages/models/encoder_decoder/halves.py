"""A row of ``demonstrations`` in two halves: what an encoder reads, and what a decoder says.

The encoder reads all up to the answer, and the decoder the answer. A row that was cut from a
document has no answer: there the encoder reads the demonstration, and the decoder the query.
Of the row's scored spans those tokens are scored that the decoder reads, its first one among them.

What stands around the halves is the model's own (``Frame``) and in no row: the decoder begins with
a start token, from which its first token is predicted, and the encoder's text ends with the
end-of-sequence token, as it did wherever T5 was trained.

Dimensions: T = tokens of a row, S = scored spans.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.errors import ConfigError

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Frame:
    """The token that a decoder begins with, and the one that ends an encoder's text, if any."""

    start_id: int
    end_id: int | None

    def encoder_ids(self, text_ids: npt.NDArray[Any]) -> Ids:
        """Return what the encoder reads of a text."""
        ends = [] if self.end_id is None else [self.end_id]
        return np.concatenate([np.asarray(text_ids, np.int64), np.array(ends, np.int64)])

    def decoder_ids(self, said_ids: npt.NDArray[Any]) -> Ids:
        """Return the start token and what is said: state j predicts token j of ``said_ids``."""
        return np.concatenate([[self.start_id], np.asarray(said_ids, np.int64)])


def frame_of(config: Any, folder: Any = "the model") -> Frame | None:
    """Return the frame of an encoder-decoder by its configuration, None of any other model.

    Raises ConfigError where no token is named to begin with.
    """
    if not getattr(config, "is_encoder_decoder", False):
        return None
    start_id = getattr(config, "decoder_start_token_id", None)
    if start_id is None:
        raise ConfigError(
            f"{folder}: config.json names no decoder_start_token_id, with which the decoder "
            f"begins: set it there (that of T5 is its pad_token_id)"
        )
    ends = getattr(config, "eos_token_id", None)
    return Frame(int(start_id), ends[0] if isinstance(ends, list) else ends)


def decoder_begins(num_tokens: int, query_start: int, answer_start: int) -> int:
    """Return the index in a row of ``num_tokens`` of the first one that the decoder says."""
    return int(answer_start if answer_start < num_tokens else query_start)


def decoder_spans(spans_S2: npt.NDArray[Any], begins: int) -> Ids:
    """Return a row's scored spans as far as the decoder says them, [S, 2]; there may be none."""
    cut_S2 = np.maximum(np.asarray(spans_S2, np.int64).reshape(-1, 2), begins)
    return cut_S2[cut_S2[:, 0] < cut_S2[:, 1]]
