"""Every kind of source gives the same documents, and what a user gets wrong is said in one line."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from schemas.errors import ConfigError
from stages.sources.documents.packing import pack, truncate
from stages.sources.documents.spool import KEY, Spool, key_columns, num_ranges
from stages.sources.documents.stage import IngestStage
from stages.sources.reading.cleaning import clean
from stages.sources.reading.rejects import MalformedRecord
from stages.sources.reading.source import Source
from stages.sources.reading.values import read_rows

TEXTS = [f"Doc {i}: caf\u00e9, \u65e5\u672c\u8a9e and\ttabs" for i in range(300)]


def source(**settings: Any) -> Source:
    return TypeAdapter(Source).validate_python(settings)


def values_of(from_source: Source, *, file: int = 0, row: int = 0) -> list[Any]:
    values = [v for rows in read_rows(from_source, file=file, row=row) for v in rows.values]
    return [value.decode() if isinstance(value, bytes) else value for value in values]


def jsonl(texts: list[str]) -> str:
    return "".join(json.dumps({"n": 1, "body": text}, ensure_ascii=False) + "\n" for text in texts)


def write_all(folder: Path) -> dict[str, Source]:
    """Write the same documents in every form, cut in two files each."""
    for number, texts in enumerate((TEXTS[:200], TEXTS[200:])):
        table = pa.table({"n": list(range(len(texts))), "body": texts})
        (folder / f"a{number}.jsonl").write_text(jsonl(texts))
        (folder / f"b{number}.jsonl.gz").write_bytes(gzip.compress(jsonl(texts).encode()))
        pq.write_table(table, folder / f"c{number}.parquet", row_group_size=70)
        with pa.ipc.new_file(folder / f"d{number}.arrow", table.schema) as out:
            out.write_table(table, max_chunksize=90)
        rows = [{"n": 1, "body": text} for text in texts]
        (folder / f"g{number}.json").write_text(json.dumps(rows, indent=number or None))
        (folder / f"e{number}.txt").write_text("".join(f"{text}\n" for text in texts))
        (folder / f"f{number}.txt").write_text("".join(f"{text}\n\n" for text in texts))
    found = {
        name: source(kind=kind, paths=[str(folder / f"{name}*")], column="body")
        for name, kind in zip("abcdg", ("jsonl", "jsonl", "parquet", "arrow", "json"), strict=True)
    }
    found["e"] = source(kind="text", paths=[str(folder / "e*")], sample_by="line")
    found["f"] = source(kind="text", paths=[str(folder / "f*")], sample_by="paragraph")
    return found


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    return write_all(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize("form", "abcdefg")
def test_every_kind_gives_the_same_documents(form: str, sources: dict[str, Source]) -> None:
    assert [value.strip() for value in values_of(sources[form])] == TEXTS


@pytest.mark.parametrize("form", "abcdefg")
def test_reading_goes_on_from_any_position(form: str, sources: dict[str, Source]) -> None:
    everything = values_of(sources[form])
    done: list[Any] = []
    for rows in read_rows(sources[form]):
        done += [value.decode() if isinstance(value, bytes) else value for value in rows.values]
        rest = values_of(sources[form], file=rows.file, row=rows.next_row)
        assert done + rest == everything


def test_whole_files_as_documents(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n\nmore\n")
    whole = source(kind="text", paths=[str(tmp_path / "*.txt")], sample_by="document")
    assert values_of(whole) == ["a\n\nmore\n", "b\n\nmore\n"]


def test_blank_lines_separate_and_byte_order_marks_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n  \ntwo\n")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "two"}\n\n')
    lines = source(kind="text", paths=[str(tmp_path / "a.txt")], sample_by="line")
    assert values_of(lines) == ["one", "two"]
    assert values_of(source(kind="jsonl", paths=[str(tmp_path / "a.jsonl")])) == ["one", "two"]


def test_bad_utf8_spoils_its_own_row_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\nbad \xff\xfe\nfine\n")
    lines = source(kind="text", paths=[str(tmp_path / "a.txt")], sample_by="line")
    values = [value for rows in read_rows(lines) for value in rows.values]
    assert [clean(value, min_chars=1, max_chars=99).text for value in values[::2]] == [
        "good",
        "fine",
    ]
    with pytest.raises(MalformedRecord, match="byte 5 is not UTF-8"):
        clean(values[1], min_chars=1, max_chars=99)


def test_empty_files_hold_no_documents(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).touch()
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    for kind in ("jsonl", "parquet"):
        assert values_of(source(kind=kind, paths=[str(tmp_path / f"a.{kind}")])) == []
    for by in ("line", "paragraph", "document"):
        text = source(kind="text", paths=[str(tmp_path / "a.txt")], sample_by=by)
        assert values_of(text) == []


def test_names_with_brackets_are_names_and_not_patterns(tmp_path: Path) -> None:
    folder = tmp_path / "a[1]"
    folder.mkdir()
    (folder / "b[2].jsonl").write_text('{"text": "found"}\n')
    pattern = str(tmp_path / "a[[]1]" / "*.jsonl")
    assert values_of(source(kind="jsonl", paths=[pattern])) == ["found"]


def test_identity_is_content_not_place(sources: dict[str, Source], tmp_path: Path) -> None:
    elsewhere = write_all(tmp_path)
    assert elsewhere["a"].identity() == sources["a"].identity()
    assert [entry["name"] for entry in sources["a"].identity()] == ["a0.jsonl", "a1.jsonl"]
    (tmp_path / "a1.jsonl").write_text(jsonl(["changed"]))
    assert elsewhere["a"].identity() != sources["a"].identity()


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="revision"):
        source(kind="hub", name="a/b", split="train")
    with pytest.raises(ValidationError, match="Extra inputs"):
        source(kind="jsonl", paths=["a"], colum="text")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"\x1f\x8b\x08\x00", r"a.jsonl is compressed, .* add '.gz'"),
        ("a.jsonl.gz", b"no gzip", r"a.jsonl.gz: cannot be read as jsonl"),
        ("a.parquet", b"no parquet", r"a.parquet: cannot be read as parquet"),
        ("a.arrow", b"no arrow", r"a.arrow: cannot be read as arrow"),
        ("a.json", b'{"text": "a"}', r"begins with '{', expected one JSON array .* kind jsonl"),
        ("a.json", b"\n", r"a.json: is empty, expected one JSON array of objects"),
        ("a.json", b'[{"text": "a"}, {"text": "b"', r"a.json: ends inside record 2: the file is"),
        ("a.json", b'[{"text": "a}, {"text": "b"}]', r"a.json: ends inside record 1: the file is"),
        ("a.json", b'[{"text": "a"}}, {"text": "b"}]', r"a.json: there is more after the end of"),
        ("a.json", b"\x1f\x8b\x08\x00", r"a.json is compressed, .* add '.gz'"),
    ],
)
def test_unreadable_input_is_one_line(
    name: str, content: bytes, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        values_of(source(kind=name.split(".")[1], paths=[str(tmp_path / name)]))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_wrong_columns_of_tables_are_named(sources: dict[str, Source], tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1], "body": ["a"]}), tmp_path / "a.parquet")
    for column, message in (("text", "it has 'n', 'body'"), ("n", "holds int64, expected strings")):
        with pytest.raises(ConfigError, match=message):
            values_of(source(kind="parquet", paths=[str(tmp_path / "a.parquet")], column=column))


def stage(tmp_path: Path, **changes: Any) -> IngestStage:
    """A stage whose tokenizer has no EOS and whose model takes 32 tokens."""
    words = {word: i for i, word in enumerate(["?", "Doc", "0", "1"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"vocab_size": 4, "max_position_embeddings": 32}')
    (tmp_path / "a.jsonl").write_text('{"text": "Doc 0"}\n')
    settings: dict[str, Any] = {
        "stage": "ingest",
        "source": {"kind": "jsonl", "paths": [str(tmp_path / "a.jsonl")]},
        "tokenizer": str(tmp_path / "model"),
        "length": 8,
        "mode": "truncate",
        "heldout_fraction": 0.5,
    }
    return IngestStage.model_validate(settings | changes)


def test_ids_beyond_the_models_vocabulary_are_rejected(tmp_path: Path) -> None:
    narrow = stage(tmp_path, heldout_fraction=0.0)
    (tmp_path / "model/config.json").write_text('{"vocab_size": 3, "n_positions": 32}')
    (tmp_path / "a.jsonl").write_text('{"text": "Doc 1"}\n')  # "1" is id 3
    with pytest.raises(ConfigError, match="token_outside_vocabulary 1"):
        narrow.prepare(tmp_path / "work")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "pack"}, "the tokenizer in .* has none; set its eos_token, or use mode: trunc"),
        ({"length": 33}, "got 33, but the model in .* takes at most 32 tokens"),
        ({"tokenizer": "/nowhere"}, "/nowhere is not a folder"),
        (
            {"source": {"kind": "jsonl", "paths": ["{folder}/b.jsonl"]}},
            r"b.jsonl:1: no column 'text'; it has 'body', 'n' \(so are all 2 records read\)$",
        ),
        (
            {"source": {"kind": "jsonl", "paths": ["{folder}/chats.jsonl"]}},
            r"no column 'text'; it has 'messages'; chats are read by stage conversations",
        ),
        ({"min_chars": 50}, r"no train row is left of 1 documents \(rejected: too_short 1\)"),
        ({"source": {"kind": "jsonl", "paths": ["/nowhere/*.jsonl"]}}, "no file matches"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "b.jsonl").write_text('{"body": "a", "n": 1}\n{"body": "b", "n": 2}\n')
    (tmp_path / "chats.jsonl").write_text('{"messages": []}\n')
    changes = json.loads(json.dumps(changes).replace("{folder}", str(tmp_path)))
    with pytest.raises(ConfigError, match=message) as caught:
        stage(tmp_path, **changes).prepare(tmp_path / "work")
    assert "\n" not in str(caught.value)


def test_normalisation_ignores_spacing_and_composition_and_nothing_else() -> None:
    def key(text: str) -> bytes:
        cleaned = clean(text, min_chars=1, max_chars=99)
        assert cleaned.text == text
        return cleaned.key

    assert key("caf\u00e9  au\n lait ") == key("cafe\u0301 au lait")
    assert len({key("a b"), key("A b"), key("a b."), key("ab")}) == 4


ID_LISTS = st.lists(
    st.lists(st.integers(1, 9), max_size=12).map(lambda ids: np.array(ids, np.uint32)), max_size=8
)


@given(batches=st.lists(ID_LISTS, max_size=4), length=st.integers(2, 7))
def test_packing_loses_and_reorders_nothing(batches: list[Any], length: int) -> None:
    carry = np.zeros(0, np.uint32)
    packed: list[int] = []
    for documents in batches:
        rows_BL, carry = pack(documents, carry, length=length, eos_id=0)
        assert rows_BL.shape[1] == length and len(carry) < length
        packed += rows_BL.reshape(-1).tolist()
    stream = [i for documents in batches for ids in documents for i in [*ids.tolist(), 0]]
    assert packed + carry.tolist() == stream


@given(documents=ID_LISTS, length=st.integers(1, 7))
def test_truncation_keeps_beginnings(documents: list[Any], length: int) -> None:
    rows, num_cut = truncate(documents, length=length)
    assert [row.tolist() for row in rows] == [ids.tolist()[:length] for ids in documents]
    assert num_cut == sum(len(ids) > length for ids in documents)


def test_spool_gives_back_every_row_in_its_range_in_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    keys = [rng.bytes(16) for _ in range(500)]
    spool = Spool(tmp_path, ranges=8)
    for start in range(0, 500, 100):
        part = keys[start : start + 100]
        frame = pl.DataFrame({**key_columns(part), "text": [key.hex() for key in part]})
        spool.write_segment(frame, {"start": start})
    spool = Spool(tmp_path, ranges=1)  # one that has segments keeps its own number
    assert spool.ranges == 8
    assert spool.state == {"start": 400}
    frames = [spool.read_ranges(index, index + 1).sort(KEY) for index in range(8)]
    assert [text for frame in frames for text in frame["text"]] == sorted(k.hex() for k in keys)
    for index, frame in enumerate(frames):
        assert {int(text[:2], 16) >> 5 for text in frame["text"]} == {index}
    assert spool.read_ranges(2, 5).height == sum(frame.height for frame in frames[2:5])


def test_ranges_are_powers_of_two_bounded() -> None:
    assert [num_ranges(n, 10) for n in (0, 1, 10, 11, 25, 80, 81)] == [1, 1, 1, 2, 4, 8, 16]
    assert num_ranges(1 << 60, 10) == 4096
