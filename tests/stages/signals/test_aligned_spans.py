"""Spans that two tokenisations agree on: against a plain search, bytes, and a forward pass.

Dimensions: T = tokens of the teacher, U = of the student, S = spans.
"""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from schemas.errors import ConfigError
from schemas.sample_id import sample_id_of
from schemas.storage.manifest import read_manifest
from schemas.storage.shards import with_split
from schemas.table import BoundTable
from schemas.tables.aligned_spans import ALIGNED_SPANS, AlignedEntries, AlignedSpans
from schemas.tables.documents import DOCUMENTS, Document
from schemas.tables.episodes import EPISODES
from schemas.tables.teacher_logits import ENCODINGS
from stages.models.checkpoints.token_bytes import ByteTokenizer, UnknownBytes
from stages.models.spec import ModelSpec
from stages.signals.aligned_spans.alignment import align
from stages.signals.aligned_spans.entries import NO_TOKEN, first_tokens
from stages.signals.aligned_spans.stage import AlignedSpansStage
from stages.signals.aligned_spans.work import measures
from stages.stage import Rejected, StageContext, TableRef
from tests.fixtures.cached_data import write_table
from tests.fixtures.odd_texts import odd_texts
from tests.fixtures.tiny_teacher import ENCODINGS as KINDS
from tests.fixtures.tiny_teacher import K, Teacher, real_documents
from tests.fixtures.tokenizer_kinds import UNK, save_kind

PAIRS = [
    *(("byte_level", "metaspace"), ("byte_level", "prepended"), ("metaspace", "byte_level")),
    *(("replaced", "byte_level"), ("prepended", "replaced"), ("byte_level", "digit_by_digit")),
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ByteTokenizer]:
    root = tmp_path_factory.mktemp("kinds")
    return {
        kind: ByteTokenizer(save_kind(root / kind, kind, "PreTrainedTokenizerFast"))
        for kind in {kind for pair in PAIRS for kind in pair} | {"composed"}
    }


def bytes_of(tokenizer: ByteTokenizer, ids: Any) -> bytes:
    return b"".join(tokenizer.bytes_of.get(int(index), b"") for index in ids)


def ids_of(tokenizer: ByteTokenizer, text: str) -> np.ndarray:
    ids, _ = tokenizer.encode(text.encode())
    return ids


def boundaries(tokenizer: ByteTokenizer, ids: Any, skipped: int = 0) -> dict[int, int]:
    """By offset in the text, how many tokens are before: the plain way, one token at a time."""
    found: dict[int, int] = {}
    offset = -skipped
    for number, index in enumerate(ids):
        found.setdefault(max(offset, 0), number)
        offset += len(tokenizer.bytes_of[int(index)])
    return found | {offset: len(ids)}


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
@given(text=odd_texts(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_spans_are_where_both_have_a_boundary(
    tokenizers: dict[str, ByteTokenizer], teacher: str, student: str, text: str, data: Any
) -> None:
    """A row is cut out of a text anywhere, inside a character too, as packing does."""
    assume("\u2581" not in text)
    one, other = tokenizers[teacher], tokenizers[student]
    every = ids_of(one, text)
    assume(len(every))
    start = data.draw(st.integers(0, len(every) - 1), label="first token")
    stop = data.draw(st.integers(start + 1, len(every)), label="end")
    ids_T = every[start:stop]
    found = align(ids_T, one, other)
    whole = bytes_of(one, ids_T)
    assert found.num_bytes == len(whole)
    covered = 0
    for (a, b), (c, d), size in zip(found.teacher_S2, found.student_S2, found.bytes_S, strict=True):
        part = bytes_of(one, ids_T[a:b])
        others = bytes_of(other, found.input_ids_U[c:d])
        assert part and len(part) == size
        assert others == part or (c == 0 and others == b" " + part)
        covered += int(size)
    # The student has the whole characters of the row and nothing else.
    given_text = bytes_of(other, found.input_ids_U)
    kept = whole.decode(errors="ignore").encode()
    skipped = len(given_text) - len(kept)
    assert given_text == b" " * skipped + kept and skipped <= 1
    lead = len(whole) - len(whole.lstrip(bytes(range(0x80, 0xC0))))
    mine = boundaries(one, ids_T)
    theirs = {
        offset + lead: at for offset, at in boundaries(other, found.input_ids_U, skipped).items()
    }
    agreed = sorted(set(mine) & set(theirs)) if len(found.input_ids_U) else []
    expected = [(mine[a], mine[b]) for a, b in pairwise(agreed)]
    assert [tuple(span) for span in found.teacher_S2.tolist()] == expected


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
@given(text=odd_texts())
@settings(max_examples=60, deadline=None)
def test_the_token_that_a_teachers_begins_with_is_the_students_next(
    tokenizers: dict[str, ByteTokenizer], teacher: str, student: str, text: str
) -> None:
    """Wherever a span is one token of the teacher's, the student's text goes on with it."""
    assume("\u2581" not in text)
    one, other = tokenizers[teacher], tokenizers[student]
    found = align(ids_of(one, text), one, other)
    first_V = first_tokens(one, other)
    for (a, b), (c, _), whole in zip(
        found.teacher_S2, found.student_S2, found.whole_S, strict=True
    ):
        if b - a == 1 and whole:
            index = int(ids_of(one, text)[a])
            assert first_V[index] in (found.input_ids_U[c], NO_TOKEN)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "replaced"])
@given(text=odd_texts())
@settings(max_examples=40, deadline=None)
def test_equal_tokenizers_have_a_span_a_token(
    tokenizers: dict[str, ByteTokenizer], kind: str, text: str
) -> None:
    assume("\u2581" not in text)
    tokenizer = tokenizers[kind]
    ids_T = ids_of(tokenizer, text)
    found = align(ids_T, tokenizer, tokenizer)
    if bytes_of(tokenizer, ids_of(tokenizer, bytes_of(tokenizer, ids_T).decode())) != bytes_of(
        tokenizer, ids_T
    ):
        return  # a second space before the text
    np.testing.assert_array_equal(found.input_ids_U, ids_T)
    singles = np.stack([np.arange(len(ids_T)), np.arange(1, len(ids_T) + 1)], axis=1)
    sizes = np.array([len(tokenizer.bytes_of[int(index)]) for index in ids_T])
    np.testing.assert_array_equal(found.teacher_S2, singles[sizes > 0])
    np.testing.assert_array_equal(found.student_S2, found.teacher_S2)


@pytest.mark.parametrize("student", ["byte_level", "metaspace"])
@pytest.mark.parametrize("teacher", ["byte_level", "metaspace"])
def test_ends_of_texts_are_spans_of_no_bytes(
    tokenizers: dict[str, ByteTokenizer], teacher: str, student: str
) -> None:
    one, other = tokenizers[teacher], tokenizers[student]
    parts = [ids_of(one, text) for text in ("hello world", "we need\n", "12")]
    bos, eos = one.named["bos"], one.named["eos"]
    ids_T = np.array([bos, *parts[0], eos, bos, *parts[1], eos, *parts[2]])
    found = align(ids_T, one, other)
    named = [other.named["bos"], *ids_of(other, "hello world")]
    named += [other.named["eos"], other.named["bos"], *ids_of(other, "we need\n")]
    named += [other.named["eos"], *ids_of(other, "12")]
    assert found.input_ids_U.tolist() == named  # no space is taken for one of the text
    assert found.num_bytes == len("hello worldwe need\n12")
    no_bytes = found.bytes_S == 0
    assert int(no_bytes.sum()) == 4 and int(found.bytes_S.sum()) == found.num_bytes
    for (a, b), (c, d) in zip(found.teacher_S2[no_bytes], found.student_S2[no_bytes], strict=True):
        assert (b - a, d - c) == (1, 1)
        assert one.special[int(ids_T[a])] == other.special[int(found.input_ids_U[c])]


def test_a_beginning_that_the_student_lacks_is_part_of_what_follows(
    tokenizers: dict[str, ByteTokenizer],
) -> None:
    one, other = tokenizers["byte_level"], tokenizers["metaspace"]
    without = ByteTokenizer(other.folder)
    without.named = {"eos": other.named["eos"]}
    text = ids_of(one, "hello world")
    ids_T = np.array([*text, one.named["eos"], one.named["bos"], *text])
    found = align(ids_T, one, without)
    after = [span for span in found.teacher_S2.tolist() if span[0] > len(text)]
    assert after[0][0] == len(text) + 1 and bytes_of(one, ids_T[slice(*after[0])])


def test_bytes_that_nobody_knows_are_refused(tokenizers: dict[str, ByteTokenizer]) -> None:
    one, other = tokenizers["metaspace"], tokenizers["byte_level"]
    text = ids_of(one, "hello")
    unknown = next(index for index, spelled in one.special.items() if spelled == UNK)
    with pytest.raises(UnknownBytes, match="token <unk> has no counterpart"):
        align(np.array([*text, unknown, *text]), one, other)
    broken = [index for index, part in other.bytes_of.items() if part == b"\xff"]
    with pytest.raises(UnknownBytes, match="no text in UTF-8"):
        align(np.array([*ids_of(other, "ab"), *broken, *ids_of(other, "ab")]), other, one)
    with pytest.raises(UnknownBytes, match="changes the text"):
        align(ids_of(other, "de\u0301j\u00e0"), other, tokenizers["composed"])


# The stage, on a tiny model's own documents.


@pytest.fixture(scope="module")
def teacher(tiny_model: Path, paragraphs: list[str]) -> Teacher:
    """Documents of a real tokenizer, the held-out ones too, and float64 log-probs of a forward."""
    documents = real_documents(tiny_model, paragraphs)
    documents = [
        *documents[:3],
        replace(documents[3], split="heldout"),
    ]
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    logprobs_PV = []
    with torch.no_grad():
        for document in documents:
            ids_BT = torch.from_numpy(document.input_ids_T.astype(np.int64))[None]
            logits_TV = model(input_ids=ids_BT).logits[0]
            logprobs_PV.append(logits_TV[:-1].log_softmax(-1).numpy())
    return Teacher(tiny_model, 512, documents, logprobs_PV, [])


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_kind(tmp_path_factory.mktemp("other"), "metaspace", "LlamaTokenizer")


def spans_of(
    teacher: Teacher,
    student: Path,
    kind: str,
    folder: Path,
    documents: list[Document],
    *,
    entries: bool = False,
) -> list[AlignedSpans | Rejected]:
    """Run ``teacher_logits`` and then the stage, as workers do."""
    bound = DOCUMENTS.bind(vocab_size=teacher.vocab_size)
    write_table(folder / "documents", bound, documents, teacher.folder)
    rows = teacher.rows(kind, folder / "head")
    sizes = {"K": K, "D": 64}
    signals: BoundTable[Any] = ENCODINGS[kind].bind(vocab_size=teacher.vocab_size, sizes=sizes)
    splits = {document.sample_id: document.split for document in teacher.documents}
    write_table(folder / "signals", signals, rows, teacher.folder, splits=splits)
    stage = stage_on(student, entries=entries)
    context = StageContext(
        folder / "spans",
        400,
        {"teacher": ModelSpec(teacher.folder, "float32", "transformers", 64)},
        input_table="teacher_logits",
        input_folder=folder / "signals",
        other_folders=(folder / "documents",),
    )
    with stage.open(context) as work:
        shard = with_split(pa.Table.from_batches([signals.to_batch(rows)]), "train")
        return list(work(shard))


def stage_on(student: Path, *, entries: bool = False) -> AlignedSpansStage:
    body = {"stage": "aligned_spans", "input": "signals", "documents": "documents"}
    return AlignedSpansStage.model_validate(
        {**body, "teacher": "teacher", "tokenizer": str(student), "entries": entries}
    )


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_those_of_a_forward_pass(
    teacher: Teacher, student: Path, kind: str, tmp_path: Path
) -> None:
    """Of each span, over the teacher's own tokens, which are found here by counting bytes."""
    rows = spans_of(teacher, student, kind, tmp_path, teacher.documents)
    one, other = ByteTokenizer(teacher.folder), ByteTokenizer(student)
    compared = 0
    for row, document, logprobs_PV in zip(
        rows, teacher.documents, teacher.logprobs_PV, strict=True
    ):
        if isinstance(row, Rejected):
            assert row.reason == "no span that both tokenizers agree on"
            continue
        assert row.source_id == document.sample_id and row.hashed_id == row.sample_id
        ids_T = document.input_ids_T.astype(np.int64)
        next_P = logprobs_PV[np.arange(len(ids_T) - 1), ids_T[1:]]
        mine = boundaries(one, ids_T)
        skipped = int(bytes_of(other, row.input_ids_T[:1]).startswith(b" ")) and int(
            not bytes_of(one, ids_T[:1]).startswith(b" ")
        )
        theirs = boundaries(other, row.input_ids_T, skipped)
        offset_of = {at: offset for offset, at in theirs.items()}
        for (start, end), found in zip(row.scored_S2, row.span_logprobs_S, strict=True):
            a, b = mine[offset_of[int(start)]], mine[offset_of[int(end)]]
            expected = next_P[a - 1 : b - 1].sum()
            assert found == pytest.approx(expected, rel=1 / 128 + 2e-3, abs=2e-3 * (b - a))
            compared += 1
    assert compared > 10


@pytest.mark.parametrize("kind", ["threshold", "threshold_tau", "top_k"])
def test_entries_are_what_the_teachers_tokens_begin_with(
    teacher: Teacher, student: Path, kind: str, tmp_path: Path
) -> None:
    """Their probabilities are those of a forward pass, summed; of ``top_k`` over all K tokens."""
    rows = spans_of(teacher, student, kind, tmp_path, teacher.documents, entries=True)
    one, other = ByteTokenizer(teacher.folder), ByteTokenizer(student)
    first_V = first_tokens(one, other)
    coarse = 0.25 if kind != "top_k" else 5e-3  # six bits a stick, at random
    found = together = 0
    for row, document, logprobs_PV in zip(
        rows, teacher.documents, teacher.logprobs_PV, strict=True
    ):
        if isinstance(row, Rejected):
            continue
        assert isinstance(row, AlignedEntries)
        alignment = align(document.input_ids_T, one, other)
        begins = alignment.student_S2[:, 0].tolist(), alignment.teacher_S2[:, 0].tolist()
        first_of = dict(zip(*begins, strict=True))
        ends = np.cumsum(row.num_entries_S)
        for span, (start, _) in enumerate(row.scored_S2.tolist()):
            kept = slice(int(ends[span]) - int(row.num_entries_S[span]), int(ends[span]))
            p_V = np.exp(logprobs_PV[first_of[start] - 1])
            top = np.argsort(-p_V)[:K]
            total = 0.0
            for index, logprob in zip(
                row.entry_ids_E[kept].tolist(), row.entry_logprobs_E[kept], strict=True
            ):
                same = np.flatnonzero(first_V == index)
                of_top = np.intersect1d(same, top)
                most = float(p_V[of_top if kind == "top_k" else same].sum())
                least = most if kind == "top_k" else float(p_V[same].max())
                probability = float(np.exp(float(logprob)))
                assert least * (1 - coarse) - 2e-3 <= probability <= most * (1 + coarse) + 2e-3
                total += probability
                found += 1
                together += len(of_top) > 1
            assert total <= 1.001
            if kind == "top_k":
                likely = {int(v) for v in first_V[top[: K - 1]]} - {NO_TOKEN}
                assert likely <= set(row.entry_ids_E[kept].tolist())
    assert found >= 5  # of a nearly flat teacher
    assert together or kind != "top_k"  # tokens of one begin count together


def test_coverage_is_counted(teacher: Teacher, student: Path, tmp_path: Path) -> None:
    rows = spans_of(teacher, student, "threshold", tmp_path, teacher.documents)
    made = [row for row in rows if isinstance(row, AlignedSpans)]
    bound = stage_on(student).bind(StageContext(tmp_path, 400))
    write_table(tmp_path / "made", bound, made, student)
    found = measures(ALIGNED_SPANS, tmp_path / "made", read_manifest(tmp_path / "made").shards)
    num_bytes = sum(row.num_bytes for row in made)
    in_spans = sum(int(row.span_bytes_S.sum()) for row in made)
    assert found["bytes"] == num_bytes and found["bytes_in_spans"] == in_spans
    assert found["share_of_bytes"] == pytest.approx(in_spans / num_bytes)
    assert 0.8 < found["share_of_bytes"] < 1.0  # the first token of a row has no log-prob
    assert found["tokens_a_span"] >= 1.0 and found["spans"] == sum(len(r.scored_S2) for r in made)


def test_a_signal_without_its_document_is_a_reject(
    teacher: Teacher, student: Path, tmp_path: Path
) -> None:
    others = [
        Document(sample_id=sample_id_of(ids), split=split, input_ids_T=ids)
        for ids, split in zip(map(np.arange, (5, 9, 7)), ("train", "train", "heldout"), strict=True)
    ]
    rows = spans_of(teacher, student, "top_k", tmp_path, others)
    assert {row.reason for row in rows if isinstance(row, Rejected)} == {
        "the documents have no such row"
    }
    assert len(rows) == len(teacher.documents)


def test_the_stage_refuses_other_tables(student: Path) -> None:
    signals = TableRef("signals", ENCODINGS["threshold"], None)
    with pytest.raises(ConfigError, match="documents: step 'few' writes episodes, expected"):
        stage_on(student).check([signals, TableRef("few", EPISODES, None)], {})
    states = TableRef("states", ENCODINGS["exact"], None)
    with pytest.raises(ConfigError, match=r"entries: step 'states' keeps hidden states \(exact\)"):
        stage_on(student, entries=True).check([states, TableRef("text", DOCUMENTS, None)], {})
    stage_on(student).check([states, TableRef("text", DOCUMENTS, None)], {})
    with pytest.raises(ConfigError, match="input: step 'few' writes episodes, this stage reads"):
        stage_on(student).check([TableRef("few", EPISODES, None), signals], {})
