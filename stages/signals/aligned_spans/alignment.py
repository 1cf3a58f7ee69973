"""Two tokenisations of one text laid over each other: the spans that both have whole tokens for.

A row of the teacher's ids becomes bytes, the bytes text, the text ids of the student's tokenizer.
Both are laid over the same units: a unit is a byte, or a special token that both have. Where a
token of each begins at the same unit, both agree; between two such units that follow one another
is a span. A token of no unit (a BOS that the other side lacks, the space that sentencepiece puts
before a text) belongs to what follows it.

A row that is cut inside a character begins or ends with bytes that are no text: the student is not
given them, and no span holds them.

Dimensions: T = tokens of the teacher's row, U = of the student's, S = spans.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.models.checkpoints.token_bytes import ByteTokenizer, UnknownBytes

I64Array = npt.NDArray[np.int64]
_CONTINUATION = 3  # a character of UTF-8 has at most so many bytes behind its first


@dataclass(frozen=True, slots=True)
class Alignment:
    """The student's ids, and each span in tokens of the teacher and of the student.

    ``whole_S``: the first token of either lies in the span with all its bytes, none put before the
    text, so what both predict there is the same.
    """

    input_ids_U: I64Array
    teacher_S2: I64Array
    student_S2: I64Array
    bytes_S: I64Array
    whole_S: npt.NDArray[np.bool_]
    num_bytes: int


def align(ids_T: npt.NDArray[Any], teacher: ByteTokenizer, student: ByteTokenizer) -> Alignment:
    """Return the spans of a row; raises UnknownBytes where its bytes are not known exactly."""
    sizes_T, marks, ids_U, begins_U, end = _laid_over(ids_T, teacher, student)
    starts_T = np.concatenate([[0], np.cumsum(sizes_T)])
    starts_U = np.array([*begins_U, end], np.int64)
    agreed = np.intersect1d(starts_T, starts_U)
    teacher_at, student_at = (np.searchsorted(starts, agreed) for starts in (starts_T, starts_U))
    is_whole_T = np.diff(starts_T) == _lengths(ids_T.tolist(), teacher)
    is_whole_U = np.diff(starts_U) == _lengths(ids_U, student)
    bytes_before = agreed - np.searchsorted(np.array(marks, np.int64), agreed)
    return Alignment(
        input_ids_U=np.array(ids_U, np.int64),
        teacher_S2=np.stack([teacher_at[:-1], teacher_at[1:]], axis=1),
        student_S2=np.stack([student_at[:-1], student_at[1:]], axis=1),
        bytes_S=np.diff(bytes_before),
        whole_S=is_whole_T[teacher_at[:-1]] & is_whole_U[student_at[:-1]],
        num_bytes=int(starts_T[-1]) - len(marks),
    )


def _laid_over(
    ids_T: npt.NDArray[Any], teacher: ByteTokenizer, student: ByteTokenizer
) -> tuple[list[int], list[int], list[int], list[int], int]:
    """Return units of the teacher's tokens, those of special tokens, and the student's tokens.

    Of those ids and first units, and the unit behind the last of them.
    """
    sizes_T: list[int] = []
    marks: list[int] = []
    ids_U: list[int] = []
    starts_U: list[int] = []
    unit = end = 0
    runs = list(_runs(ids_T.tolist(), teacher))
    for number, (is_text, run) in enumerate(runs):
        if not is_text:
            for token in run:
                other = _counterpart(token, teacher, student)
                sizes_T.append(int(other is not None))
                if other is not None:
                    marks.append(unit)
                    ids_U.append(other)
                    starts_U.append(unit)
                    unit += 1
            end = unit
            continue
        parts = [teacher.bytes_of[token] for token in run]
        if number and teacher.prepends and parts[0].startswith(b" "):
            parts[0] = parts[0][1:]  # it stands before every text, and is none of it
        text = b"".join(parts)
        first, stop = _whole_characters(text, is_first=not number, is_last=run is runs[-1][1])
        ids, sizes = student.encode(text[first:stop])
        ids_U += ids.tolist()
        starts_U += (unit + first + np.cumsum(sizes) - sizes).tolist()
        sizes_T += map(len, parts)
        end = unit + stop
        unit += len(text)
    begins = student.prefix_ids
    if begins and ids_U[: len(begins)] != begins:
        first_unit = starts_U[0] if starts_U else 0
        ids_U, starts_U = [*begins, *ids_U], [*(first_unit for _ in begins), *starts_U]
    return sizes_T, marks, ids_U, starts_U, end


def _lengths(ids: list[int], tokenizer: ByteTokenizer) -> I64Array:
    """Return how many units a token is where none is left out: its bytes, one of a special one."""
    return np.array([len(tokenizer.bytes_of.get(token, b".")) for token in ids], np.int64)


def _runs(ids: list[int], teacher: ByteTokenizer) -> Iterator[tuple[bool, list[int]]]:
    """Yield runs of text and of special tokens, in turn."""
    for is_text, run in groupby(ids, key=lambda token: token in teacher.bytes_of):
        yield is_text, list(run)


def _counterpart(token: int, teacher: ByteTokenizer, student: ByteTokenizer) -> int | None:
    """Return the student's token in the place of a special one, None for a BOS that it lacks."""
    if token == teacher.named.get("eos") and "eos" in student.named:
        return student.named["eos"]
    if token == teacher.named.get("bos") and token != teacher.named.get("eos"):
        return student.named.get("bos")
    spelled = teacher.special.get(token)
    for index, content in student.special.items():
        if spelled is not None and content == spelled:
            return int(index)
    raise UnknownBytes(f"token {teacher.spelling(token)} has no counterpart")


def _whole_characters(text: bytes, *, is_first: bool, is_last: bool) -> tuple[int, int]:
    """Return where the whole characters of a run begin and end; only a row's ends may be cut."""
    first = 0
    while is_first and first < min(_CONTINUATION, len(text)) and text[first] & 0xC0 == 0x80:
        first += 1
    try:
        text[first:].decode()
    except UnicodeDecodeError as error:
        if is_last and error.reason == "unexpected end of data":
            return first, first + error.start
        raise UnknownBytes("its bytes are no text in UTF-8") from error
    return first, len(text)
