"""Table ``advantages``: how much an aligned teacher prefers each next token to its reference.

At every position of a student's response, ``A(a) = beta (log p_aligned(a) - log p_reference(a))``
over next tokens a, in nats (ADPA, arXiv 2502.17927). Differences are taken in float32 before they
are narrowed: log-probs stored in half precision and subtracted later lose their sign. Entry j of a
row is about token j of the responses end to end, given the prompt and the tokens of that response
before it. Five variants:

- ``exact``: both models' final hidden states; their heads lie once beside the shards.
- ``threshold``: K tokens drawn with probabilities that rise with ``m |A|``, m the mean of the
  distributions of aligned teacher, reference and student (``schemas.distribution`` says how), each
  with the log of its probability of being drawn, so that ``sum_k pi(a_k) A(a_k) / inclusion_k`` is
  an unbiased estimate of the sum over the vocabulary. A is rounded to 7 significant bits.
- ``threshold_tau``: the same with one threshold for the whole table, so that the number of tokens
  follows the position, less a constant of each position, and with ``A / inclusion`` in one byte:
  ``schemas.advantage_values`` says how.
- ``union_top_k``: the likeliest tokens of all three, exact, and one advantage for all others
  together: beta times the log of the ratio of what the two models leave over.
- ``as_released``: the published code's top K, with its floor in the place of missing values.

Dimensions: P = response tokens of the row, N = responses, K = kept tokens, E = kept tokens of all
positions, D and R = hidden widths of aligned teacher and reference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...distribution import ids_of_gaps
from ...ragged import id_twice, surely_counted
from ...table import CAPTURE_ZSTD_LEVEL, MOST_LOGPROB, TOKEN_ID, TOKEN_ID_HIGH, Column, Table

Array = npt.NDArray[Any]
Columns = Mapping[str, Sequence[Any]]
HEAD_FOLDERS = ("teacher_head", "reference_head")  # beside the shards of ``exact``
SampleId = Annotated[str, Column(pa.string(), "joins responses.sample_id")]
TokenAdvantages = Annotated[
    Array, Column(pa.float16(), "A of the token that was generated", dims="P", unit="nats")
]
TeacherLogprobs = Annotated[
    Array,
    Column(
        pa.float32(),
        "aligned teacher's, of each response",
        dims="N",
        unit="nats",
        high=MOST_LOGPROB,
    ),
]
ReferenceLogprobs = Annotated[
    Array,
    Column(pa.float32(), "reference's, of each response", dims="N", unit="nats", high=MOST_LOGPROB),
]
Advantages = Annotated[Array, Column(pa.float16(), "A of each", dims="PK", unit="nats")]


class _Scored:
    """What the rows of every support can count."""

    __slots__ = ()
    sample_id: str
    token_advantages_P: Array
    teacher_logprobs_N: Array
    reference_logprobs_N: Array

    @property
    def num_positions(self) -> int:
        """Response tokens of the row."""
        return len(self.token_advantages_P)

    @property
    def num_tokens(self) -> int:
        """The same: prompts are counted where they are stored."""
        return self.num_positions


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactAdvantages(_Scored):
    """Both models' final hidden states, in float32."""

    sample_id: SampleId
    teacher_hidden_PD: Annotated[Array, Column(pa.float32(), "aligned teacher's", dims="PD")]
    reference_hidden_PR: Annotated[Array, Column(pa.float32(), "reference's", dims="PR")]
    token_advantages_P: TokenAdvantages
    teacher_logprobs_N: TeacherLogprobs
    reference_logprobs_N: ReferenceLogprobs

    def __post_init__(self) -> None:
        """Check that lengths agree; raises ValueError naming the sample."""
        _check_positions(self, len(self.teacher_hidden_PD), len(self.reference_hidden_PR))

    @staticmethod
    def surely_sound(columns: Columns) -> bool:
        """Whether all rows of a record batch are what ``__post_init__`` asks for."""
        return _positions_agree(columns, "teacher_hidden_PD", "reference_hidden_PR")


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdAdvantages(_Scored):
    """K drawn tokens a position, each with its advantage and how likely it was to be drawn."""

    sample_id: SampleId
    token_ids_PK: Annotated[
        Array, Column(TOKEN_ID, "the sure ones first, then drawn", dims="PK", distinct=True)
    ]
    advantages_PK: Advantages
    log_inclusions_PK: Annotated[
        Array,
        Column(
            pa.float16(), "log of the probability of being drawn; 0 is sure", dims="PK", high=0.0
        ),
    ]
    token_advantages_P: TokenAdvantages
    teacher_logprobs_N: TeacherLogprobs
    reference_logprobs_N: ReferenceLogprobs

    def __post_init__(self) -> None:
        """Check that lengths agree; raises ValueError naming the sample."""
        columns = self.token_ids_PK, self.advantages_PK, self.log_inclusions_PK
        _check_positions(self, *map(len, columns))

    @staticmethod
    def surely_sound(columns: Columns) -> bool:
        """Whether all rows of a record batch are what ``__post_init__`` asks for."""
        return _positions_agree(columns, "token_ids_PK", "advantages_PK", "log_inclusions_PK")


@dataclass(frozen=True, slots=True, kw_only=True)
class TauAdvantages(_Scored):
    """Drawn tokens, as many as the position asks for, each with A over its chance, less a rest."""

    sample_id: SampleId
    num_entries_P: Annotated[Array, Column(pa.uint8(), "kept tokens of each position", dims="P")]
    id_gaps_low_E: Annotated[
        Array,
        Column(pa.uint8(), "their ids by rising id: each less the one before, mod 256", dims="E"),
    ]
    id_gaps_high_E: Annotated[
        Array, Column(TOKEN_ID_HIGH, "the same, divided by 256 and rounded down", dims="E")
    ]
    value_codes_E: Annotated[
        Array,
        Column(
            pa.uint8(),
            "of c: (A - rest) / inclusion is 2^((c >> 1) / 3 - 18) nats, negative where c is odd",
            dims="E",
        ),
    ]
    rest_advantages_P: Annotated[
        Array, Column(pa.float16(), "what is taken off every A", dims="P", unit="nats")
    ]
    token_advantages_P: TokenAdvantages
    teacher_logprobs_N: TeacherLogprobs
    reference_logprobs_N: ReferenceLogprobs

    def __post_init__(self) -> None:
        """Check that lengths agree and ids are distinct; raises ValueError naming the sample."""
        _check_positions(self, len(self.num_entries_P), len(self.rest_advantages_P))
        row = {name: [getattr(self, name)] for name in ("num_entries_P", *_ENTRIES)}
        if not _entries_agree(row):
            raise ValueError(f"sample {self.sample_id}: entries do not match their counts")
        if (twice := id_twice(*_ids_of(row))) is not None:
            raise ValueError(f"sample {self.sample_id}: id {twice} is kept twice at one position")

    @staticmethod
    def surely_sound(columns: Columns) -> bool:
        """Whether all rows of a record batch are what ``__post_init__`` asks for."""
        return (
            _positions_agree(columns, "num_entries_P", "rest_advantages_P")
            and _entries_agree(columns)
            and id_twice(*_ids_of(columns)) is None
        )

    @staticmethod
    def largest_id(columns: Columns) -> int:
        """Return the largest token id of a record batch, which no column tells alone."""
        return int(_ids_of(columns)[1].max(initial=0))


_ENTRIES = ("id_gaps_low_E", "id_gaps_high_E", "value_codes_E")


def _entries_agree(columns: Columns) -> bool:
    """Whether rows have as many entries as they count."""
    counts = columns["num_entries_P"]
    return all(surely_counted(counts, columns[name]) for name in _ENTRIES)


def _ids_of(columns: Columns) -> tuple[Array, Array]:
    """Return the position of each entry, and its id."""
    names = ("num_entries_P", *_ENTRIES[:2])
    counts_P, *gaps = (np.concatenate(columns[name]) for name in names)
    return np.repeat(np.arange(len(counts_P)), counts_P), ids_of_gaps(counts_P, *gaps)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnionAdvantages(_Scored):
    """The likeliest tokens of three models, exact, and one advantage for all others together."""

    sample_id: SampleId
    num_entries_P: Annotated[
        Array, Column(pa.uint16(), "kept tokens of each position", dims="P", low=1)
    ]
    token_ids_E: Annotated[Array, Column(TOKEN_ID, "of all positions, end to end", dims="E")]
    advantages_E: Annotated[Array, Column(pa.float16(), "A of each", dims="E", unit="nats")]
    rest_advantages_P: Annotated[
        Array, Column(pa.float16(), "A of all other tokens as one", dims="P", unit="nats")
    ]
    token_advantages_P: TokenAdvantages
    teacher_logprobs_N: TeacherLogprobs
    reference_logprobs_N: ReferenceLogprobs

    def __post_init__(self) -> None:
        """Check that lengths agree; raises ValueError naming the sample."""
        _check_positions(self, len(self.num_entries_P), len(self.rest_advantages_P))
        entries = int(np.asarray(self.num_entries_P, np.int64).sum())
        if {len(self.token_ids_E), len(self.advantages_E)} != {entries}:
            raise ValueError(f"sample {self.sample_id}: {entries} entries are counted, not stored")
        position_E = np.repeat(np.arange(len(self.num_entries_P)), self.num_entries_P)
        if (twice := id_twice(position_E, self.token_ids_E)) is not None:
            raise ValueError(
                f"sample {self.sample_id}: token_ids_E holds id {twice} twice at one position"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasedAdvantages(_Scored):
    """The aligned teacher's K likeliest tokens, as the published code scores them (no beta)."""

    sample_id: SampleId
    token_ids_PK: Annotated[
        Array, Column(TOKEN_ID, "by falling probability", dims="PK", distinct=True)
    ]
    advantages_PK: Advantages
    token_advantages_P: TokenAdvantages
    teacher_logprobs_N: TeacherLogprobs
    reference_logprobs_N: ReferenceLogprobs

    def __post_init__(self) -> None:
        """Check that lengths agree; raises ValueError naming the sample."""
        _check_positions(self, len(self.token_ids_PK), len(self.advantages_PK))

    @staticmethod
    def surely_sound(columns: Columns) -> bool:
        """Whether all rows of a record batch are what ``__post_init__`` asks for."""
        return _positions_agree(columns, "token_ids_PK", "advantages_PK")


AnyAdvantages = (
    ExactAdvantages | ThresholdAdvantages | TauAdvantages | UnionAdvantages | ReleasedAdvantages
)


def _check_positions(row: AnyAdvantages, *lengths: int) -> None:
    expected = len(row.token_advantages_P)
    if {*lengths} != {expected} or not expected:
        raise ValueError(
            f"sample {row.sample_id}: {expected} token advantages beside {sorted({*lengths})} "
            f"entries"
        )
    if len(row.teacher_logprobs_N) != len(row.reference_logprobs_N):
        raise ValueError(f"sample {row.sample_id}: unlike numbers of responses")


def _positions_agree(columns: Columns, *names: str) -> bool:
    """Whether every row of a record batch has positions, as many in each of these columns."""
    expected = [*map(len, columns["token_advantages_P"])]
    teacher, reference = columns["teacher_logprobs_N"], columns["reference_logprobs_N"]
    return (
        all([*map(len, columns[name])] == expected for name in names)
        and min(expected, default=0) > 0
        and [*map(len, teacher)] == [*map(len, reference)]
    )


_NAME, _VERSION = "advantages", 1
EXACT = Table(
    ExactAdvantages, name=_NAME, version=_VERSION, variant="exact", zstd_level=CAPTURE_ZSTD_LEVEL
)
THRESHOLD = Table(
    ThresholdAdvantages,
    name=_NAME,
    version=_VERSION,
    variant="threshold",
    zstd_level=CAPTURE_ZSTD_LEVEL,
)
THRESHOLD_TAU = Table(
    TauAdvantages,
    name=_NAME,
    version=_VERSION,
    variant="threshold_tau",
    zstd_level=CAPTURE_ZSTD_LEVEL,
)
UNION_TOP_K = Table(
    UnionAdvantages,
    name=_NAME,
    version=_VERSION,
    variant="union_top_k",
    zstd_level=CAPTURE_ZSTD_LEVEL,
)
AS_RELEASED = Table(
    ReleasedAdvantages,
    name=_NAME,
    version=_VERSION,
    variant="as_released",
    zstd_level=CAPTURE_ZSTD_LEVEL,
)
SUPPORTS: dict[str, Table[Any]] = {
    table.variant: table for table in (EXACT, THRESHOLD, THRESHOLD_TAU, UNION_TOP_K, AS_RELEASED)
}
