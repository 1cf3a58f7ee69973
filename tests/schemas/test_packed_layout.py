"""The packed layout: equal rows bit for bit, sizes against counting, and what is refused.

Dimensions: P = positions, V = vocabulary.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from schemas.distribution import STICK_LEVELS
from schemas.errors import StoreError
from schemas.packing.batches import open_batches
from schemas.packing.entries import unused_bits
from schemas.packing.priors import LEVELS
from schemas.storage.shards import read_shard, write_shard
from schemas.tables.teacher_logits import THRESHOLD_TAU, TauLogits


def row_of(
    number: int,
    num_positions: int,
    vocab_size: int,
    *,
    head: tuple[int, int] = (0, 5),
    tail: tuple[int, int] = (0, 12),
) -> TauLogits:
    """Draw a row: counts from ranges, ids mostly small, codes and floats of any value."""
    draw = np.random.default_rng(number)
    heads_P = draw.integers(*head, size=num_positions)
    tails_P = np.maximum(draw.integers(*tail, size=num_positions), heads_P == 0)
    head_ids, low, high = [], [], []
    for num_head, num_tail in zip(heads_P, tails_P, strict=True):
        ids = draw.choice(vocab_size, num_head + num_tail, replace=False)
        if draw.random() < 0.5:
            ids = draw.permutation(num_head + num_tail)  # the commonest ids
        head_ids.append(ids[:num_head])
        gaps = np.diff(np.sort(ids[num_head:]), prepend=0)
        low.append(gaps & 255)
        high.append(gaps >> 8)
    floats_P = draw.integers(0, 1 << 16, size=num_positions).astype(np.uint16).view(np.float16)
    return TauLogits(
        sample_id=f"{number:024x}",
        first_target=1 + number % 3,
        num_head_P=heads_P.astype(np.uint8),
        num_tail_P=tails_P.astype(np.uint8),
        head_ids_H=np.concatenate(head_ids),
        head_codes_H=draw.integers(0, 64, size=int(heads_P.sum())).astype(np.uint8),
        tail_gaps_low_E=np.concatenate(low).astype(np.uint8),
        tail_gaps_high_E=np.concatenate(high),
        next_token_logprobs_P=-np.abs(floats_P),
        entropies_P=np.abs(floats_P[::-1]),
    )


def write(folder: Path, rows: list[TauLogits], vocab_size: int, *, packed: bool) -> Path:
    path = folder / f"{'packed' if packed else 'plain'}.arrow"
    bound = THRESHOLD_TAU.bind(vocab_size=vocab_size, packed=packed)
    assert write_shard(path, bound, iter(rows)).num_rows == len(rows)
    return path


def bits_of(table: pa.Table) -> list[dict[str, Any]]:
    """All columns of all rows, floats as their bits: a NaN is not equal to itself."""
    rows = []
    for batch in table.to_batches():
        for row in THRESHOLD_TAU.rows(batch):
            values = ((name, getattr(row, name)) for name in THRESHOLD_TAU.columns)
            rows.append({n: v if np.isscalar(v) else (v.dtype.str, v.tobytes()) for n, v in values})
    return rows


@pytest.mark.parametrize(
    ("vocab_size", "shape"),
    [
        (49_152, {}),
        (300, {"head": (0, 120), "tail": (0, 136)}),
        (200_000, {"head": (1, 2), "tail": (0, 1)}),
        (200_000, {"head": (0, 1), "tail": (1, 30)}),
        (70_000, {"head": (3, 4), "tail": (2, 3)}),
    ],
    ids=["mixed", "255 entries", "no tails", "no heads", "equal counts"],
)
def test_rows_come_back_bit_for_bit(tmp_path: Path, vocab_size: int, shape: Any) -> None:
    rows = [row_of(n, 1 + 7 * n, vocab_size, **shape) for n in range(21)]
    plain, packed = (
        read_shard(write(tmp_path, rows, vocab_size, packed=packed)) for packed in (False, True)
    )
    packed.validate(full=True)
    assert packed.schema.equals(plain.schema, check_metadata=True)
    assert bits_of(packed) == bits_of(plain)


def test_a_record_batch_is_read_without_those_before_it(tmp_path: Path) -> None:
    rows = [row_of(n, 30, 5_000) for n in range(40)]
    whole = read_shard(write(tmp_path, rows, 5_000, packed=False))
    opened = open_batches(pa.memory_map(str(write(tmp_path, rows, 5_000, packed=True))))
    assert opened.num_record_batches == 3
    last = pa.Table.from_batches([opened.get_batch(2)])
    assert bits_of(last) == bits_of(whole)[32:]


def test_equal_rows_give_equal_bytes_and_none_an_empty_shard(tmp_path: Path) -> None:
    rows = [row_of(n, 30, 5_000) for n in range(20)]
    first = write(tmp_path, rows, 5_000, packed=True).read_bytes()
    assert write(tmp_path, rows, 5_000, packed=True).read_bytes() == first
    assert read_shard(write(tmp_path, [], 5_000, packed=True)).num_rows == 0


def test_a_set_takes_the_bits_that_tell_it_from_all_others(tmp_path: Path) -> None:
    vocab_size, num_tail, num_positions, num_rows = 4_096, 12, 500, 32
    rows = [
        row_of(n, num_positions, vocab_size, head=(0, 1), tail=(num_tail, num_tail + 1))
        for n in range(num_rows)
    ]
    draw = np.random.default_rng(0)
    for row in rows:
        ids = [draw.choice(vocab_size, num_tail, replace=False) for _ in range(num_positions)]
        gaps_E = np.diff(np.sort(ids), axis=1, prepend=0).reshape(-1)
        row.tail_gaps_low_E[:], row.tail_gaps_high_E[:] = gaps_E & 255, gaps_E >> 8
        row.next_token_logprobs_P[:], row.entropies_P[:] = -1.0, 1.0
    raw = pa.ipc.open_file(pa.memory_map(str(write(tmp_path, rows, vocab_size, packed=True))))
    stored = raw.read_all()["packed"].to_pylist()
    bits = sum(map(len, stored)) * 8 / (num_rows * num_positions)
    of_sets = math.log2(math.comb(vocab_size, num_tail))
    of_lists = sum(math.log2(vocab_size - n) for n in range(num_tail))
    assert of_lists - of_sets > 28  # what the order of 12 ids would take
    assert of_sets * 0.99 < bits < of_sets * 1.015


def test_bits_that_no_value_uses_are_left_out() -> None:
    seven_significant = np.array([1.5, -0.0078125, 3.15625], np.float16)
    assert unused_bits(seven_significant) == 4
    assert unused_bits(np.array([1.0, 2.0, 0.0], np.float16)) == 7
    assert unused_bits(np.array([0.1], np.float16)) == 1  # 0x2E66
    assert unused_bits(np.zeros(0, np.float16)) == 7


def test_contexts_are_whole_numbers_that_no_rounding_of_a_machine_moves() -> None:
    bits = -np.log2(1.0 - STICK_LEVELS[:-1]) * 65_536
    parts = -np.log2(np.arange(64, 0, -1) / 64) * 65_536
    for exact in (bits, parts):
        assert np.abs(exact - np.floor(exact) - 0.5).min() > 1e-6
    assert (np.diff(LEVELS) > 0).all() and LEVELS[16] == 16 and LEVELS[24] == 32


@pytest.fixture
def packed_file(tmp_path: Path) -> Path:
    return write(tmp_path, [row_of(n, 30, 5_000) for n in range(20)], 5_000, packed=True)


def changed(path: Path, **columns: Any) -> None:
    """Write a packed file again with other values."""
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all().combine_chunks()
        batches = [pa.RecordBatch.from_pylist(part, schema=table.schema) for part in parts(table)]
    for name, change in columns.items():
        at = table.schema.get_field_index(name)
        values = batches[0].column(at).to_pylist()
        values[0] = change(values[0])
        batches[0] = batches[0].set_column(
            at, table.schema.field(at), pa.array(values, table.schema.field(at).type)
        )
    with pa.ipc.new_file(str(path), table.schema) as out:
        for batch in batches:
            out.write_batch(batch)


def parts(table: pa.Table) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, table.num_rows, 16):
        yield table.slice(start, 16).to_pylist()


def test_a_changed_byte_never_makes_other_rows(packed_file: Path) -> None:
    """The order of ids in one leaf is a bit that nobody reads: there the rows are the same."""
    whole, content = bits_of(read_shard(packed_file)), packed_file.read_bytes()
    refused = 0
    for place in range(1, 40):

        def flipped(packed: bytes, share: float = place / 40) -> bytes:
            at = int(len(packed) * share)
            return packed[:at] + bytes([packed[at] ^ 0x10]) + packed[at + 1 :]

        packed_file.write_bytes(content)
        changed(packed_file, packed=flipped)
        try:
            assert bits_of(read_shard(packed_file)) == whole
        except StoreError as error:
            assert "record batch 0 of a packed shard cannot be unpacked" in str(error)
            refused += 1
    assert refused > 30


def test_too_few_positions_are_said(packed_file: Path) -> None:
    changed(packed_file, num_positions=lambda count: count - 1)
    with pytest.raises(StoreError, match="cannot be unpacked"):
        read_shard(packed_file)


def test_without_the_coder_one_line_says_what_to_install(
    packed_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(StoreError, match=r"pip install 'teachercache\[packed\]'"):
        read_shard(packed_file)


def test_another_layout_is_refused(packed_file: Path) -> None:
    with pa.memory_map(str(packed_file)) as source:
        table = pa.ipc.open_file(source).read_all()
    newer = table.replace_schema_metadata({**table.schema.metadata, b"packed_layout": b"2"})
    with pa.ipc.new_file(str(packed_file), newer.schema) as out:
        out.write_table(newer)
    with pytest.raises(StoreError, match="packed layout 2, and layout 1 is read here"):
        read_shard(packed_file)
