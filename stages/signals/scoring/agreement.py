"""How far a stored row is from what a live teacher says of it, beyond what its storage rounds.

An audit asks a stage for three things, in the module ``audit`` beside its work: ``questions``, what
to ask of a live teacher about some rows of the input; ``open_live``, that teacher, opened; and
``measures``, what is compared. An answer stands ``beside`` a stored row, and beside another
``live`` answer to the same question, which tells how far two sound passes are apart.

A difference is 0 where the stored value is what storage makes of the live one: float16 and codes
round, and that is no disagreement. So a difference is never more than that of the two passes
themselves, and what is allowed between live ones is allowed of a cache.

Dimensions: P = compared values of a row (positions, responses, candidates, subsets).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.stage import Rejected, Work

F64Array = npt.NDArray[np.float64]
I64Array = npt.NDArray[np.int64]
Array = npt.NDArray[Any]
Row = Mapping[str, Any]

_DOUBLE = 1.0 + 1 / 16  # rounded to float16 first: a sixteenth of what 7 bits round
# The least that is allowed, in nats: what engines of one dtype differ by where a control of a few
# rows shows less. float32: vLLM and transformers on a CPU came within 3e-4 on three architectures.
NATS = {"float32": 5e-4, "float16": 4e-3, "bfloat16": 3e-2}
SUMS = {"float32": 2e-3, "float16": 2e-2, "bfloat16": 0.15}  # of log-probs of whole answers
MASS = {"float32": 2e-4, "float16": 2e-3, "bfloat16": 1.5e-2}


@dataclass(frozen=True, slots=True)
class Measure:
    """What is compared: its unit, what one value is of, the least allowed by a model's dtype."""

    unit: str
    of: str
    floors: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Question:
    """One row of the input, or its beginning, as it is put to a live teacher.

    ``rows`` is that row alone, ``num_read`` the tokens that are read of it, ``places_P`` where in
    the stored row the compared positions are.
    """

    sample_id: str
    rows: pa.Table
    num_read: int
    places_P: I64Array
    expected: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A stored row beside a live answer: differences [P] by measure, and what was left out of it.

    ``stored_P`` and ``live_P`` are values of the row that tell it from others; ``problem`` is what
    no tolerance allows, such as another number of positions.
    """

    sample_id: str
    places_P: I64Array
    apart: dict[str, F64Array] = field(default_factory=dict)
    truncation: dict[str, F64Array] = field(default_factory=dict)
    stored_P: F64Array = field(default_factory=lambda: np.zeros(0))
    live_P: F64Array = field(default_factory=lambda: np.zeros(0))
    problem: str = ""


class Answer(Protocol):
    """What a live teacher says of one row; of equal questions two may stand side by side."""

    @property
    def question(self) -> Question:
        """What was asked."""

    def beside(self, stored: Row) -> Compared:
        """Compare with the stored row of the same key."""

    def beside_live(self, other: Any, stored: Row) -> dict[str, F64Array]:
        """Return by measure how far two live answers are apart, in what ``stored`` holds."""


Ask = Callable[[Sequence[Question]], Iterable[Answer | Rejected]]


def beyond_float16(stored_P: Array, live_P: Array) -> F64Array:
    """Return by how much a stored float16 misses the live value, beyond half of its last bit."""
    return _beyond(stored_P, live_P, np.spacing(np.abs(np.asarray(stored_P, np.float16))) / 2)


def beyond_mantissa(stored_P: Array, live_P: Array) -> F64Array:
    """The same of values that ``round_mantissa`` rounded to 7 significant bits."""
    spacing_P = np.spacing(np.abs(np.asarray(stored_P, np.float16))).astype(np.float64)
    return _beyond(stored_P, live_P, 16 * spacing_P / 2 * _DOUBLE)


def beyond_steps(stored_P: Array, live_P: Array, step: float) -> F64Array:
    """The same of values that were rounded to a whole number of steps."""
    return _beyond(stored_P, live_P, np.full(np.shape(stored_P), step / 2))


def _beyond(stored_P: Array, live_P: Array, half_P: Array) -> F64Array:
    apart_P = np.abs(np.asarray(stored_P, np.float64) - np.asarray(live_P, np.float64))
    return np.asarray(np.maximum(apart_P - np.asarray(half_P, np.float64), 0.0))


def over_length(missed_PD: Array, live_PD: Array) -> F64Array:
    """Return the length of what is missed over that of the live state, [P].

    A state may be 0 (after a norm, where its input is): the least length that counts is a
    thousandth of the row's largest.
    """
    lengths_P = np.linalg.norm(np.asarray(live_PD, np.float64), axis=1)
    least = max(1e-3 * float(lengths_P.max(initial=0.0)), 1e-6)
    missed_P = np.linalg.norm(np.asarray(missed_PD, np.float64), axis=1)
    return np.asarray(missed_P / np.maximum(lengths_P, least))


def beyond_levels(levels: F64Array, codes: Array, uniforms: Array, values: Array) -> F64Array:
    """Return by how much live values miss those that are rounded to ``codes`` by ``uniforms``.

    Rounding is to one of ``levels``, which rise, at random. Code c comes of the level below it
    where the uniform is less than the way from there, and of its own level where it is not: of
    values from ``L[c-1] + u step[c-1]`` to ``L[c] + u step[c]``.
    """
    steps = np.concatenate([[0.0], np.diff(levels), [0.0]])
    starts = np.concatenate([levels[:1], levels])
    at = np.asarray(codes, np.intp)
    u = np.asarray(uniforms, np.float64)
    least = starts[at] + u * steps[at]
    most = np.minimum(starts[at + 1] + u * steps[at + 1], levels[-1])
    return np.asarray(np.maximum(np.maximum(least - values, values - most), 0.0))


def of_other_shape(question: Question, found: Mapping[str, Any]) -> Compared | None:
    """Return the verdict on a row that has not what its input asks for; None where it has."""
    for name, expected in question.expected.items():
        if found[name] != expected:
            problem = f"{name} is {found[name]}, its input asks for {expected}"
            return Compared(
                sample_id=question.sample_id, places_P=question.places_P[:0], problem=problem
            )
    return None


def _short(values: Array) -> str:
    shown = ", ".join(f"{value:.6g}" for value in np.atleast_1d(values).ravel()[:6].tolist())
    return f"[{shown}{', ...' if values.size > 6 else ''}]"


@dataclass(frozen=True, slots=True)
class Remade:
    """A row that the stage's own work made again, whose columns are compared as they are.

    ``exact`` columns have to be equal, ``close`` are numbers by column and measure; ``problem``
    says what a stored row has wrong by itself.
    """

    question: Question
    row: Any
    exact: tuple[str, ...]
    close: Mapping[str, str]
    problem: Callable[[Row], str] = lambda stored: ""

    def beside(self, stored: Row) -> Compared:
        """Compare with the stored row: columns of equal lengths, those that are exact equal."""
        problem = self.problem(stored)
        for name in (*self.exact, *self.close):
            one, other = np.asarray(stored[name]), np.asarray(getattr(self.row, name))
            differs = name in self.exact and not np.array_equal(one, other)
            if one.shape != other.shape or differs:
                problem = problem or f"{name} is {_short(one)}, the live row has {_short(other)}"
        if problem:
            places_P = self.question.places_P[:0]
            return Compared(sample_id=self.question.sample_id, places_P=places_P, problem=problem)
        first = next(iter(self.close))
        return Compared(
            sample_id=self.question.sample_id,
            places_P=np.arange(len(stored[first])),
            apart=self._apart(lambda name: stored[name]),
            stored_P=np.asarray(stored[first], np.float64),
            live_P=np.asarray(getattr(self.row, first), np.float64),
        )

    def beside_live(self, other: "Remade", stored: Row) -> dict[str, F64Array]:
        """Return how far the numbers of two live rows are apart."""
        return self._apart(lambda name: getattr(other.row, name))

    def _apart(self, other: Callable[[str], Any]) -> dict[str, F64Array]:
        found = {}
        for name, measure in self.close.items():
            live_P = np.asarray(getattr(self.row, name), np.float64)
            found[measure] = np.abs(np.asarray(other(name), np.float64) - live_P)
        return found


def remade(
    work: Work,
    exact: tuple[str, ...],
    close: Mapping[str, str],
    problem: Callable[[Row], str] = lambda stored: "",
) -> Ask:
    """Return what answers questions by a stage's own work, rows of any shards at once."""

    def ask(asked: Sequence[Question]) -> Iterable[Answer | Rejected]:
        rows = work(pa.concat_tables([question.rows for question in asked]))
        for question, row in zip(asked, rows, strict=True):
            is_row = not isinstance(row, Rejected)
            yield Remade(question, row, exact, close, problem) if is_row else row

    return ask
