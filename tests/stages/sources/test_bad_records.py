"""Every reader of records passes over every kind of bad record, counts it, and keeps all others."""

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from schemas.errors import ConfigError, RejectLimitError
from stages.sources.preference_pairs.readers import read_pairs
from stages.sources.preference_pairs.stage import PairSource
from stages.sources.reading.cleaning import clean
from stages.sources.reading.json_array import array_elements
from stages.sources.reading.rejects import HOPELESS, LISTED, MalformedRecord, Rejects
from stages.sources.reading.source import Source
from stages.sources.reading.values import read_rows
from stages.sources.tasks.readers import read_tasks
from stages.sources.tasks.sources import TaskSource
from tests.servers.hub_server import hub_server, use_hub

Record = dict[str, Any]
OPENERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def read_documents(rejects: Rejects, **settings: Any) -> int:
    """Read as stage ``ingest`` does, without its spool; return how many texts are left."""
    kept = 0
    for rows in read_rows(TypeAdapter(Source).validate_python(settings)):
        for number, value in zip(rows.numbers, rows.values, strict=True):
            rejects.num_read += 1
            with rejects.passing(f"{rows.where}:{number}"):
                if isinstance(value, MalformedRecord):
                    raise value
                clean(value, min_chars=1, max_chars=100)
                kept += 1
    return kept


def count_pairs(rejects: Rejects, **settings: Any) -> int:
    source: Any = TypeAdapter(PairSource).validate_python(settings)
    return len(list(read_pairs(source, rejects)))


def count_examples(rejects: Rejects, **settings: Any) -> int:
    tasks = read_tasks([TypeAdapter(TaskSource).validate_python(settings)], rejects)
    return sum(len(task.examples) for task in tasks)


@dataclass(frozen=True)
class Reader:
    """A kind of file of records: how a good one looks, and which of its fields must be texts."""

    count: Callable[..., int]
    settings: Record
    good: Callable[[int], Record]
    texts: tuple[str, ...]
    empties: bool = True  # whether the reader itself looks for empty texts


def said(role: str, text: str, *keys: str) -> dict[str, str]:
    return dict(zip(keys, (role, text), strict=True))


OPTIONS = {"options": ["yes", "no"]}
READERS = {
    "documents": Reader(
        read_documents, {"kind": "jsonl"}, lambda i: {"id": i, "text": f"document {i}"}, ("text",)
    ),
    "pairs": Reader(
        count_pairs,
        {"kind": "jsonl"},
        lambda i: {"prompt": f"q{i}", "chosen": "a", "rejected": "b"},
        ("prompt", "chosen", "rejected"),
        empties=False,
    ),
    "transcripts": Reader(
        count_pairs,
        {"kind": "jsonl", "format": "hh_rlhf"},
        lambda i: {
            "chosen": f"\n\nHuman: {i}\n\nAssistant: a",
            "rejected": f"\n\nHuman: {i}\n\nAssistant: b",
        },
        ("chosen", "rejected"),
    ),
    "sharegpt": Reader(
        count_pairs,
        {"kind": "jsonl", "format": "sharegpt"},
        lambda i: {
            "conversations": [said("human", f"q{i}", "from", "value")],
            "chosen": said("gpt", "a", "from", "value"),
            "rejected": said("gpt", "b", "from", "value"),
        },
        ("conversations", "chosen", "rejected"),
    ),
    "metaicl": Reader(
        count_examples,
        {"kind": "metaicl"},
        lambda i: {"task": "t", "input": f"q{i}", "output": "no" if i % 2 else "yes"} | OPTIONS,
        ("task", "input", "output"),
    ),
    "bigbench": Reader(
        count_examples,
        {"kind": "bigbench"},
        lambda i: {"input": f"q{i}", "target": f"a{i}"},
        ("input", "target"),
    ),
    "lama": Reader(
        count_examples,
        {"kind": "lama"},
        lambda i: {"sub_label": f"s{i}", "obj_label": f"o{i % 3}"},
        ("sub_label", "obj_label"),
    ),
    "rows": Reader(
        count_examples,
        {
            "kind": "rows",
            "name": "t",
            "task_kind": "multiple_choice",
            "input": ["title", "body"],
            "output": "label",
            "options": "options",
        },
        lambda i: {"title": f"t{i}", "body": f"b{i}", "label": "yes"} | OPTIONS,
        ("title", "body", "label"),
        empties=False,
    ),
}
WHOLE_FILE = {"bigbench"}  # one JSON a file: a line of it is no record

VALUES: dict[str, Any] = {
    "null": None,
    "number": 3,
    "nan": float("nan"),
    "truth value": True,
    "list of numbers": [3],
    "list of null": [None],
    "object": {"a": "b"},
    "empty list": [],
    "lone surrogate": "\ud800",
}
LINES = {
    "torn": b'{"text": "a", "prom',
    "list": b'["a"]',
    "text": b'"a"',
    "number": b"7",
    "null": b"null",
    "nan": b"NaN",
    "not utf-8": b'{"text": "\xff"}',
    "too deep": b"[" * 100_000,
    "too long a number": b'{"text": ' + b"1" * 5_000 + b"}",
    "words": b"no JSON at all",
}
HARMS = [("line", name) for name in LINES] + [("value", name) for name in VALUES]
HARMS += [("missing", ""), ("empty", "")]


def harmed(reader: Reader, kind: str, name: str, which: int, number: int) -> object:
    """Return a bad record: bytes are a line of its own."""
    record, field = reader.good(number), reader.texts[which % len(reader.texts)]
    match kind:
        case "line":
            return LINES[name]
        case "missing":
            return {key: value for key, value in record.items() if key != field}
        case "empty":
            return record | {field: "" if isinstance(record[field], str) else []}
        case _:
            return record | {field: VALUES[name]}


def write(folder: Path, name: str, records: Sequence[object]) -> Record:
    """Write a file of records for a reader, and return the settings that read it."""
    reader = READERS[name]
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    if name in WHOLE_FILE:
        body = b'{"name": "t", "examples": [' + b",".join(lines) + b"]}"
    else:
        body = b"".join(line + b"\n" for line in lines)
    path = folder / ("task.json" if name in WHOLE_FILE else "records.jsonl")
    path.write_bytes(body)
    if name == "lama":
        file = folder / "templates.jsonl"
        file.write_text('{"relation": "records", "template": "[X] is [Y] ."}\n')
        return reader.settings | {"paths": [str(path)], "templates": str(file)}
    if name == "rows":
        return reader.settings | {"source": {"kind": "jsonl", "paths": [str(path)]}}
    return reader.settings | {"paths": [str(path)]}


def harms_of(name: str) -> list[tuple[str, str]]:
    reader = READERS[name]
    skipped = {"line"} if name in WHOLE_FILE else set()
    skipped |= set() if reader.empties else {"empty"}
    return [harm for harm in HARMS if harm[0] not in skipped]


def cases() -> Iterator[Any]:
    for name, reader in READERS.items():
        for kind, what in harms_of(name):
            for which, field in enumerate(reader.texts if kind != "line" else ("",)):
                yield pytest.param(name, kind, what, which, id=f"{name}-{field}-{kind}-{what}")


@pytest.mark.parametrize(("name", "kind", "what", "which"), cases())
def test_one_bad_record_costs_itself_alone(
    name: str, kind: str, what: str, which: int, tmp_path: Path
) -> None:
    reader, rejects = READERS[name], Rejects()
    good = [reader.good(number) for number in range(6)]
    records = [harmed(reader, kind, what, which, 9), *good]  # the first line, of all
    assert reader.count(rejects, **write(tmp_path, name, records)) == len(good)
    assert sum(rejects.counts.values()) == 1
    (row,) = rejects.listed
    (reason,) = rejects.counts
    assert row["reason"] == reason and row["detail"] and "\n" not in row["detail"]
    assert ":1" in row["place"] or "example 1" in row["place"]
    json.dumps(row).encode()


@settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("name", READERS)
def test_whatever_is_bad_and_wherever_it_lies(
    name: str, data: st.DataObject, tmp_path: Path
) -> None:
    reader, rejects = READERS[name], Rejects()
    harm = st.tuples(st.sampled_from(harms_of(name)), st.integers(0, 2))
    plan = data.draw(st.lists(st.none() | harm, max_size=12)) + [None] * 3
    order = data.draw(st.permutations(range(len(plan))))
    records = [
        reader.good(number) if step is None else harmed(reader, *step[0], step[1], number)
        for number, step in enumerate(plan[place] for place in order)
    ]
    kept = reader.count(rejects, **write(tmp_path, name, records))
    assert kept == plan.count(None)
    lost = sum(count for reason, count in rejects.counts.items() if not reason.startswith("task_"))
    assert lost == len(plan) - kept
    rejects.require_within(1.0)


@pytest.mark.parametrize("name", sorted(READERS.keys() - WHOLE_FILE))
def test_a_format_that_is_wrong_as_a_whole_is_one_line_with_its_columns(
    name: str, tmp_path: Path
) -> None:
    rejects = Rejects()
    records: list[object] = [b"# notes", *({"uno": i, "dos": "b"} for i in range(5))]
    with pytest.raises(ConfigError) as caught:
        READERS[name].count(rejects, **write(tmp_path, name, records))
        rejects.require_within(1.0)
    line = str(caught.value)
    assert ":2: no column '" in line and "it has 'uno', 'dos' (so are all 6 records read)" in line


def test_too_many_malformed_records_are_one_line_and_the_limit_says_how_many(
    tmp_path: Path,
) -> None:
    rejects = Rejects()
    good = [READERS["documents"].good(number) for number in range(98)]
    found = write(tmp_path, "documents", [*good, {"text": None}, {"text": None}, {"text": ""}])
    assert read_documents(rejects, **found) == 98
    rejects.require_within(2 / 101)  # what is empty is not malformed
    with pytest.raises(RejectLimitError) as caught:
        rejects.require_within(0.01)
    assert str(caught.value) == (
        "2 of 101 records are malformed, more than max_rejected_fraction 0.01: 2 x 'missing_text', "
        f"first {tmp_path / 'records.jsonl'}:99: 'text' is null, expected a text; repair them, or "
        "raise max_rejected_fraction"
    )
    assert Rejects.from_json(json.loads(json.dumps(rejects.as_json()))) == rejects


def test_long_lists_are_cut_and_hopeless_ones_are_not_read_to_their_end(tmp_path: Path) -> None:
    rejects = Rejects()
    found = write(tmp_path, "documents", [{"body": "a"}] * (HOPELESS + 500))
    with pytest.raises(ConfigError, match=rf"it has 'body' \(so are all {HOPELESS:,} records"):
        read_documents(rejects, **found)
    assert (rejects.num_read, len(rejects.listed)) == (HOPELESS, LISTED)


def test_a_bad_element_of_an_array_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    bodies = ['{"text": "a, [b"}', '{"text": 1}', "[3]", '{"text" "c"}', "null", '{"text": "}\\""}']
    path.write_bytes(("[" + " ,\n".join(bodies)).encode() + b', {"text": "\xff"}]\n')
    rejects = Rejects()
    assert read_documents(rejects, kind="json", paths=[str(path)]) == 2
    assert rejects.counts == {
        "not_a_string": 1, "not_an_object": 2, "broken_json": 1, "invalid_unicode": 1
    }  # fmt: skip
    assert [row["place"] for row in rejects.listed] == [f"{path}:{n}" for n in (2, 3, 4, 5, 7)]


@pytest.mark.parametrize("read", [1, 2, 3, 7, 1 << 20])
def test_an_array_is_cut_wherever_reading_stops(
    read: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quotes, escapes and brackets within texts, nested lists, blanks: as ``json`` itself reads."""
    monkeypatch.setattr("stages.sources.reading.json_array._READ", read)
    texts = ['"', "\\", '\\\\"', "],[", "{}", '\\"}]', "\u65e5\u672c", ""]
    rows = [{"text": text, "more": [[text], {"k": [texts]}]} for text in texts]
    for indent in (None, 2):
        body = json.dumps(rows, indent=indent, ensure_ascii=False).encode()
        found = array_elements(io.BytesIO(b"\xef\xbb\xbf \n" + body + b" \n"), tmp_path)
        assert [json.loads(element) for element in found] == rows


def test_an_open_quote_does_not_take_a_whole_file_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.sources.reading.json_array._READ", 16)
    monkeypatch.setattr("stages.sources.reading.json_array._LONGEST", 64)
    stream = io.BytesIO(b'[{"text": "a"}, {"text: "b"}' + b', {"text": "c"}' * 100)
    elements = array_elements(stream, tmp_path)
    assert next(elements) == b'{"text": "a"}'
    with pytest.raises(ConfigError, match="record 2 does not end within"):
        list(elements)
    assert stream.tell() < 128


STRINGS = pa.array(["a", None, "", "b", "c"])
BROKEN = pa.Array.from_buffers(  # "\xff" where a text should be: Arrow does not look
    pa.string(),
    3,
    [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")],
)


def columnar(folder: Path, kind: str, table: pa.Table) -> Record:
    path = folder / f"records.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as out:
            out.write_table(table)
    return {"kind": kind, "paths": [str(path)]}


@pytest.mark.parametrize("kind", ["parquet", "arrow", "hub"])
def test_columns_with_holes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rejects = Rejects()
    table = pa.table({"n": [1, 2, 3, 4, 5], "text": STRINGS})
    if kind == "hub":
        pq.write_table(table, tmp_path / "train.parquet")
        with hub_server() as hub:
            commit = hub.push("datasets/a/b", tmp_path)
            use_hub(monkeypatch, hub.url, tmp_path / "hub")
            found: Record = {"kind": "hub", "name": "a/b", "revision": commit, "split": "train"}
            assert read_documents(Rejects(), **found) == 3
        use_hub(monkeypatch, "", tmp_path / "hub", offline=True)
    else:
        found = columnar(tmp_path, kind, table)
    assert read_documents(rejects, **found) == 3
    assert rejects.counts == {"missing_text": 1, "empty_text": 1}
    assert rejects.listed[0]["place"].endswith(":2")


@pytest.mark.parametrize(
    ("kind", "column", "kept", "counts"),
    [
        ("parquet", pa.nulls(2), 0, {"missing_text": 2}),
        ("arrow", pa.nulls(2), 0, {"missing_text": 2}),
        ("parquet", BROKEN, 2, {"invalid_unicode": 1}),
    ],
)
def test_columns_of_nothing_and_texts_that_are_not_utf8(
    kind: str, column: pa.Array, kept: int, counts: Record, tmp_path: Path
) -> None:
    table = pa.table({"text": column, "chosen": column, "rejected": column})
    found, rejects = columnar(tmp_path, kind, table), Rejects()
    assert read_documents(rejects, **found) == kept
    assert rejects.counts == counts
    rejects = Rejects()
    assert count_pairs(rejects, **found, prompt="text") == kept
    assert rejects.counts == counts


def test_an_arrow_file_that_breaks_its_own_format_is_one_line(tmp_path: Path) -> None:
    found = columnar(tmp_path, "arrow", pa.table({"text": BROKEN}))
    with pytest.raises(ConfigError, match=r"cannot be read as arrow: .* UTF8"):
        read_documents(Rejects(), **found)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_messages_with_holes(kind: str, tmp_path: Path) -> None:
    rows: list[Record] = [
        {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]}
        for text in ("a", None, "b")
    ]
    rows += [{"chosen": None}, {"chosen": []}]
    table = pa.Table.from_pylist([row | {"rejected": rows[0]["chosen"]} for row in rows])
    rejects = Rejects()
    assert count_pairs(rejects, **columnar(tmp_path, kind, table)) == 2
    assert rejects.counts == {"bad_messages": 2, "missing_text": 1}


def test_labels_without_a_name_are_counted(tmp_path: Path) -> None:
    import datasets

    kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    table = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c", "d"], "label": [1, -1, 0, None]}, features=datasets.Features(kinds)
    )
    table.to_parquet(tmp_path / "rows.parquet")
    rejects = Rejects()
    source = {"kind": "parquet", "paths": [str(tmp_path / "rows.parquet")]}
    named = {"kind": "rows", "name": "t", "task_kind": "classification", "output": "label"}
    assert count_examples(rejects, **named, source=source, input="text") == 2
    assert rejects.malformed == {"not_a_string": 1, "missing_text": 1}


@pytest.mark.parametrize("ending", sorted(OPENERS))
def test_compressed_lines(ending: str, tmp_path: Path) -> None:
    lines = b'\xef\xbb\xbf{"text": "a"}\r\n{"text": \n{"text": ["b"]}\n\n{"text": "\xff"}\n'
    lines += b'{"text": "c"}'
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(OPENERS[ending](lines))
    rejects = Rejects()
    assert read_documents(rejects, kind="jsonl", paths=[str(path)]) == 2
    assert rejects.malformed == {"broken_json": 1, "not_a_string": 1, "invalid_unicode": 1}
    assert [row["place"][-2:] for row in rejects.listed] == [":2", ":3", ":5"]
    rejects = Rejects()
    assert read_documents(rejects, kind="text", paths=[str(path)], sample_by="line") == 4
    assert rejects.malformed == {"invalid_unicode": 1}


@pytest.mark.parametrize("ending", sorted(OPENERS))
def test_a_compressed_file_that_is_damaged_is_one_line(ending: str, tmp_path: Path) -> None:
    body = OPENERS[ending](b"".join(b'{"text": "number %d"}\n' % i for i in range(5_000)))
    for number, harmed in enumerate((body[: len(body) // 2], body[:400] + b"\0" * 99 + body[499:])):
        path = tmp_path / f"a{number}.jsonl{ending}"
        path.write_bytes(harmed)
        with pytest.raises(ConfigError, match=rf"a{number}.jsonl{ending}: cannot be read as jsonl"):
            read_documents(Rejects(), kind="jsonl", paths=[str(path)])
