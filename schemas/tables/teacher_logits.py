"""Table ``teacher_logits``: what the teacher predicts at each position, in one of five encodings.

Values are log-probabilities of the *raw* distribution: natural log, temperature 1, after whatever
the model's own config does to its logits (soft-capping, scaling), before any sampling processor.
Entry j of a row is the distribution over the token at index ``first_target + j`` given all tokens
before it. The first token of a document has no context and no entry. Where the input's rows name
their scored tokens (``schemas.scored_spans``), entries are those of all spans end to end, and
``first_target`` is where the first span begins. An encoder-decoder has entries for those of them
that its decoder says, the last ones of a row. Of a preference pair, token ids are those of prompt,
chosen and rejected end to end: ``first_target`` is where the chosen response begins, and a rejected
token's context is the prompt and the rejected tokens before it.

``next_token_logprobs_P`` and ``entropies_P`` describe the full distribution, whatever is kept of
it; the ``threshold`` variant rounds them to 7 significant bits (``schemas.distribution``). Of a
``top_k`` row that another program captured nobody knows them, and they are NaN: the entropies all,
log-probs where the next token is not among the K.

Dimensions: P = scored positions, K = kept entries, D = hidden width, H = head entries of all
positions together, E = tail entries of all positions (of ``threshold``: its head entries).
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pyarrow as pa

from ..distribution import tail_ids, unpack_top_k
from ..ragged import id_twice, surely_counted
from ..rounded_states import hidden_states, num_beyond
from ..table import (
    CAPTURE_ZSTD_LEVEL,
    KEPT,
    MOST_LOGPROB,
    TOKEN_ID,
    TOKEN_ID_HIGH,
    Column,
    Table,
)
from .logit_columns import (
    Array,
    Columns,
    Entropies,
    EntropiesIfKnown,
    FirstTarget,
    NextTokenLogprobs,
    NextTokenLogprobsIfKnown,
    SampleId,
    ScoredPositions,
    check_positions,
    positions_agree,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdLogits(ScoredPositions):
    """A row in ``threshold`` encoding (see ``schemas.distribution``): unbiased, K entries."""

    sample_id: SampleId
    first_target: FirstTarget
    token_ids_PK: Annotated[
        Array,
        Column(
            TOKEN_ID, "head by falling probability, then sampled tail", dims="PK", distinct=True
        ),
    ]
    num_head_P: Annotated[
        Array, Column(pa.uint8(), "how many of the K are the head", dims="P", high=KEPT)
    ]
    head_codes_E: Annotated[
        Array, Column(pa.uint8(), "broken-stick fractions of the head entries", dims="E", high=63)
    ]
    next_token_logprobs_P: NextTokenLogprobs
    entropies_P: Entropies

    def __post_init__(self) -> None:
        """Check that lengths agree; raises ValueError naming the sample."""
        check_positions(self, len(self.token_ids_PK), len(self.num_head_P))
        if int(self.num_head_P.sum(dtype=np.int64)) != len(self.head_codes_E):
            raise ValueError(f"sample {self.sample_id}: head codes do not match the head counts")

    @staticmethod
    def surely_sound(columns: Columns) -> bool:
        """Whether all rows of a record batch are what ``__post_init__`` asks for."""
        counted = positions_agree(columns, "token_ids_PK", "num_head_P")
        return counted and surely_counted(columns["num_head_P"], columns["head_codes_E"])


@dataclass(frozen=True, slots=True, kw_only=True)
class TauLogits(ScoredPositions):
    """A row in ``threshold_tau`` encoding (see ``schemas.distribution``): unbiased, ragged."""

    sample_id: SampleId
    first_target: FirstTarget
    num_head_P: Annotated[Array, Column(pa.uint8(), "head entries of each position", dims="P")]
    num_tail_P: Annotated[Array, Column(pa.uint8(), "sampled entries after them", dims="P")]
    head_ids_H: Annotated[
        Array, Column(TOKEN_ID, "of all positions, by falling probability at each", dims="H")
    ]
    head_codes_H: Annotated[
        Array, Column(pa.uint8(), "broken-stick fractions of the head entries", dims="H", high=63)
    ]
    tail_gaps_low_E: Annotated[
        Array,
        Column(pa.uint8(), "sampled ids by rising id: each less the one before, mod 256", dims="E"),
    ]
    tail_gaps_high_E: Annotated[
        Array, Column(TOKEN_ID_HIGH, "the same, divided by 256 and rounded down", dims="E")
    ]
    next_token_logprobs_P: NextTokenLogprobs
    entropies_P: Entropies

    def __post_init__(self) -> None:
        """Check that lengths agree and ids are distinct; raises ValueError naming the sample."""
        check_positions(self, len(self.num_head_P), len(self.num_tail_P))
        row = {name: [getattr(self, name)] for name in (*_COUNTS, *_HEAD, *_TAIL)}
        if not _entries_agree(row):
            raise ValueError(f"sample {self.sample_id}: entries do not match their counts")
        if (twice := id_twice(*_ids_of(row))) is not None:
            raise ValueError(f"sample {self.sample_id}: id {twice} is kept twice at one position")

    @staticmethod
    def surely_sound(columns: Columns) -> bool:
        """Whether all rows of a record batch are what ``__post_init__`` asks for."""
        return (
            positions_agree(columns, "num_head_P", "num_tail_P")
            and _entries_agree(columns)
            and id_twice(*_ids_of(columns)) is None
        )

    @staticmethod
    def largest_id(columns: Columns) -> int:
        """Return the largest sampled token id of a record batch, which no column tells alone."""
        return int(_ids_of(columns)[1].max(initial=0))


_COUNTS, _HEAD = ("num_head_P", "num_tail_P"), ("head_ids_H", "head_codes_H")
_TAIL = ("tail_gaps_low_E", "tail_gaps_high_E")


def _entries_agree(columns: Columns) -> bool:
    """Whether rows have as many entries as they count, and one or more at each position."""
    head, tail = (columns[name] for name in _COUNTS)
    return (
        all(surely_counted(head, columns[name]) for name in _HEAD)
        and all(surely_counted(tail, columns[name]) for name in _TAIL)
        and bool((np.concatenate(head) | np.concatenate(tail)).all())
    )


def _ids_of(columns: Columns) -> tuple[Array, Array]:
    """Return the position of each entry, and its id: first all heads, then all tails."""
    joined = {name: np.concatenate(columns[name]) for name in (*_COUNTS, "head_ids_H", *_TAIL)}
    places = [np.repeat(np.arange(len(joined[name])), joined[name]) for name in _COUNTS]
    ids = joined["head_ids_H"].astype(np.int64), tail_ids(joined)
    return np.concatenate(places), np.concatenate(ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKLogits(ScoredPositions):
    """A row in ``top_k`` encoding: the K largest, and the mass of all others in one number."""

    sample_id: SampleId
    first_target: FirstTarget
    token_ids_PK: Annotated[
        Array, Column(TOKEN_ID, "by falling probability", dims="PK", distinct=True)
    ]
    logprobs_PK: Annotated[
        Array,
        Column(
            pa.float16(),
            "full-vocabulary log-probs",
            dims="PK",
            unit="nats",
            low=-math.inf,
            high=MOST_LOGPROB,
            falling=True,
        ),
    ]
    rest_logprobs_P: Annotated[
        Array,
        Column(
            pa.float16(),
            "log of the mass outside the K",
            dims="P",
            unit="nats",
            low=-math.inf,
            high=MOST_LOGPROB,
        ),
    ]
    next_token_logprobs_P: NextTokenLogprobsIfKnown
    entropies_P: EntropiesIfKnown

    def __post_init__(self) -> None:
        """Check that lengths agree; raises ValueError naming the sample."""
        check_positions(self, len(self.token_ids_PK), len(self.rest_logprobs_P))
        if self.logprobs_PK.shape != self.token_ids_PK.shape:
            raise ValueError(f"sample {self.sample_id}: log-probs and token ids differ in shape")
        if not _known_alike(self.next_token_logprobs_P, self.entropies_P):
            raise ValueError(
                f"sample {self.sample_id}: next_token_logprobs_P or entropies_P holds nan, which "
                f"stands for what is not known, beside entropies that are"
            )

    @staticmethod
    def surely_sound(columns: Columns) -> bool:
        """Whether all rows of a record batch are what ``__post_init__`` asks for."""
        ids, logprobs = columns["token_ids_PK"], columns["logprobs_PK"]
        return (
            positions_agree(columns, "token_ids_PK", "rest_logprobs_P")
            and all(a.shape == b.shape for a, b in zip(ids, logprobs, strict=True))
            and all(map(_known_alike, columns["next_token_logprobs_P"], columns["entropies_P"]))
        )

    @property
    def mass_P(self) -> Array:
        """The mass of the K + 1 buckets of each position, float32: one, but for rounding."""
        kept_PK, rest_P = unpack_top_k(self.logprobs_PK, self.rest_logprobs_P)
        return np.asarray(kept_PK.sum(axis=1) + rest_P)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactLogits(ScoredPositions):
    """A row in ``exact`` encoding: the final hidden state; the head lies once beside the shards."""

    sample_id: SampleId
    first_target: FirstTarget
    hidden_PD: Annotated[Array, Column(pa.float16(), "input of the language head", dims="PD")]
    next_token_logprobs_P: NextTokenLogprobs
    entropies_P: Entropies

    def __post_init__(self) -> None:
        """Check that lengths agree; raises ValueError naming the sample."""
        check_positions(self, len(self.hidden_PD), len(self.hidden_PD))

    @staticmethod
    def surely_sound(columns: Columns) -> bool:
        """Whether all rows of a record batch are what ``__post_init__`` asks for."""
        return positions_agree(columns, "hidden_PD")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedLogits(ScoredPositions):
    """A row of ``exact`` in fewer bytes: states in whole steps (``schemas.rounded_states``)."""

    sample_id: SampleId
    first_target: FirstTarget
    hidden_codes_PD: Annotated[
        Array, Column(pa.int8(), "input of the language head in steps; -128: beyond", dims="PD")
    ]
    hidden_beyond_E: Annotated[
        Array, Column(pa.int32(), "the steps of those beyond 127 either way, in order", dims="E")
    ]
    hidden_step: Annotated[float, Column(pa.float32(), "what a code is multiplied with", low=0.0)]
    rounding_kl: Annotated[
        float,
        Column(
            pa.float32(),
            "KL from the teacher unrounded, mean of up to 32 positions of the row",
            unit="nats",
        ),
    ]
    next_token_logprobs_P: NextTokenLogprobs
    entropies_P: Entropies

    def __post_init__(self) -> None:
        """Check that lengths agree; raises ValueError naming the sample."""
        check_positions(self, len(self.hidden_codes_PD), len(self.hidden_codes_PD))
        expected, found = num_beyond(self.hidden_codes_PD), len(self.hidden_beyond_E)
        if expected != found:
            raise ValueError(
                f"sample {self.sample_id}: {expected} codes stand for a number beyond, there are "
                f"{found}"
            )

    @property
    def hidden_PD(self) -> Array:
        """The states, float32, as ``schemas.hidden_states`` returns them of a row that is read."""
        names = ("hidden_codes_PD", "hidden_beyond_E", "hidden_step")
        return hidden_states({name: getattr(self, name) for name in names})

    @staticmethod
    def surely_sound(columns: Columns) -> bool:
        """Whether all rows of a record batch are what ``__post_init__`` asks for."""
        pairs = zip(columns["hidden_codes_PD"], columns["hidden_beyond_E"], strict=True)
        return positions_agree(columns, "hidden_codes_PD") and all(
            num_beyond(codes_PD) == len(beyond_E) for codes_PD, beyond_E in pairs
        )


AnyLogits = ThresholdLogits | TauLogits | TopKLogits | ExactLogits | RoundedLogits


def _known_alike(next_token_logprobs_P: Array, entropies_P: Array) -> bool:
    """Whether a row knows all of its entropies, and then all else, or none of them."""
    is_unknown_P = np.isnan(entropies_P)
    return bool(is_unknown_P.all() or not (is_unknown_P | np.isnan(next_token_logprobs_P)).any())


NAME, VERSION = "teacher_logits", 1
THRESHOLD = Table(
    ThresholdLogits, name=NAME, version=VERSION, variant="threshold", zstd_level=CAPTURE_ZSTD_LEVEL
)
THRESHOLD_TAU = Table(
    TauLogits, name=NAME, version=1, variant="threshold_tau", zstd_level=CAPTURE_ZSTD_LEVEL
)
TOP_K = Table(
    TopKLogits, name=NAME, version=VERSION, variant="top_k", zstd_level=CAPTURE_ZSTD_LEVEL
)
EXACT = Table(
    ExactLogits, name=NAME, version=VERSION, variant="exact", zstd_level=CAPTURE_ZSTD_LEVEL
)
EXACT_INT8 = Table(
    RoundedLogits, name=NAME, version=1, variant="exact_int8", zstd_level=CAPTURE_ZSTD_LEVEL
)
ENCODINGS: dict[str, Table[Any]] = {
    table.variant: table for table in (THRESHOLD, THRESHOLD_TAU, TOP_K, EXACT, EXACT_INT8)
}
WHOLE = (EXACT.variant, EXACT_INT8.variant)  # those that hold every distribution whole
