"""Task files of every kind give the same checked examples, and a bad row is said in one line."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter, ValidationError

from schemas.errors import ConfigError
from stages.sources.tasks.lama import wording_of
from stages.sources.tasks.readers import read_tasks
from stages.sources.tasks.sources import TaskSource
from stages.sources.tasks.task import Task

COUNTRIES = [("France", "Paris"), ("Italy", "Rome"), ("Peru", "Lima"), ("Chad", "N'Djamena")]


def source(**settings: Any) -> TaskSource:
    return TypeAdapter(TaskSource).validate_python(settings)


def read(**settings: Any) -> list[Task]:
    return read_tasks([source(**settings)], Counter())


def read_one(**settings: Any) -> Task:
    (task,) = read(**settings)
    return task


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return str(path)


def jsonl(path: Path, *records: object) -> str:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def refusal(**settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(**settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def crossfit(folder: Path, name: str, rows: list[tuple[str, str]]) -> str:
    return write(folder / name, "".join(f"{a}\t{b}\n" for a, b in rows))


def texts(task: Task) -> list[tuple[str, str]]:
    return [(example.inputs[0], example.output) for example in task.examples]


def test_crossfit_merges_seeds_and_splits_of_a_task(tmp_path: Path) -> None:
    rows = [("a [SEP] b", "yes"), ("c", " no"), ("d\u2028e", "yes")]
    for seed, split, part in ((13, "train", rows[:2]), (21, "dev", rows[1:]), (42, "test", rows)):
        crossfit(tmp_path / "glue-x", f"glue-x_16_{seed}_{split}.tsv", part)
    counts: Counter[str] = Counter()
    chosen = source(kind="crossfit", paths=[str(tmp_path / "*")], task_kind="classification")
    (task,) = read_tasks([chosen], counts)
    assert (task.name, task.kind, task.options) == ("glue-x", "classification", (" no", "yes"))
    assert texts(task) == rows
    assert counts == {"duplicate_example": 1}
    assert task.examples[2].place.endswith("glue-x_16_21_dev.tsv:2")
    assert [entry["name"] for entry in chosen.identity()] == [
        "glue-x_16_13_train.tsv",
        "glue-x_16_21_dev.tsv",
    ]


def test_crossfit_reads_the_seeds_asked_for(tmp_path: Path) -> None:
    for seed in (13, 21):
        crossfit(tmp_path, f"t_16_{seed}_train.tsv", [(f"in {seed}", f"out {seed}")])
    settings = {"kind": "crossfit", "paths": [str(tmp_path)], "task_kind": "generation"}
    assert texts(read_one(**settings, seeds=[21])) == [("in 21", "out 21")]
    assert "is of seeds [42] and splits ['test']" in refusal(
        **settings, seeds=[42], splits=["test"]
    )
    with pytest.raises(ValidationError, match="13, 21, 42, 87 or 100"):
        source(**settings, seeds=[14])
    crossfit(tmp_path, "notes.tsv", [("a", "b")])
    assert "notes.tsv: expected a name like <task>_" in refusal(**settings)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("a\tyes\nb no\n", ":2: got 1 columns, expected 2: input, a tab, output"),
        ("a\tyes\tb\nb\tno\n", ":1: got 3 columns, expected 2"),
        ("a\tyes\n\nb\tno\n", ":2: got 1 columns"),
        ("a\tyes\n \tno\n", ":2: task 't': empty input; remove the row"),
        ("a\tyes\nb\t \n", ":2: task 't': empty answer; remove the row"),
        ("a\tyes\nb\tyes\n", "task 't': ['yes'] is its only label"),
        ("a\tyes\nb\t\ud800\n", ":2: byte 3 is not UTF-8"),
        ("", "is empty, expected one example a line"),
    ],
)
def test_bad_crossfit_rows(body: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t_16_13_train.tsv", body)
    assert message in refusal(kind="crossfit", paths=[path], task_kind="classification")


def metaicl(task: str, text: str, output: str, options: list[str]) -> dict[str, Any]:
    return {"task": task, "input": text, "output": output, "options": options}


def test_metaicl_tells_the_kind_by_the_options(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "mixed.jsonl",
        metaicl("sum", "long text", "short", []),
        metaicl("nli", "p h", "yes", ["yes", "no"]),
        metaicl("nli", "p i", "no", ["no", "yes"]),
        metaicl("quiz", "who?", "he", ["he", "she"]),
        metaicl("quiz", "what?", "it", ["it", "that", "this"]),
    )
    nli, quiz, summary = read(kind="metaicl", paths=[path])
    assert [(t.name, t.kind) for t in (nli, quiz, summary)] == [
        ("nli", "classification"),
        ("quiz", "multiple_choice"),
        ("sum", "generation"),
    ]
    assert nli.options == ("yes", "no")
    assert [quiz.options_of(example) for example in quiz.examples] == [
        ("he", "she"),
        ("it", "that", "this"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"task": "t", "input": "a"', ":2: not valid JSON (Expecting ',' delimiter at character"),
        ("[1]", ":2: got a JSON list, expected an object"),
        ('{"task": "t", "output": "a"}', ":2: expected a text 'input', got only task, output"),
        ('{"task": "t", "input": 3, "output": "a"}', ":2: expected a text 'input', got a int"),
        (
            '{"task": "t", "input": "b", "output": "z", "options": ["x", "y", "w"]}',
            ":2: task 't': answer 'z' is not among the options ['x', 'y', 'w']; repair",
        ),
        (
            '{"task": "t", "input": "b", "output": "x", "options": ["x", "x", "y"]}',
            ":2: task 't': option 'x' is there twice; remove one",
        ),
        ('{"task": "t", "input": "b", "output": "x"}', ":2: task 't': no options, and a multiple"),
        (
            '{"task": "t", "input": "b", "output": "x", "options": "x"}',
            ":2: 'options' is 'x', expected a list of texts",
        ),
        (
            '{"task": "t", "input": "\\ud800", "output": "x", "options": ["x", "y"]}',
            ":2: task 't': text is not valid Unicode",
        ),
    ],
)
def test_bad_metaicl_rows(line: str, message: str, tmp_path: Path) -> None:
    good = json.dumps(metaicl("t", "a", "x", ["x", "y"]))
    path = write(tmp_path / "t.jsonl", f"{good}\n{line}\n")
    assert message in refusal(kind="metaicl", paths=[path])


def bigbench(path: Path, *examples: object) -> str:
    return write(path, json.dumps({"name": "riddles", "canary": "...", "examples": list(examples)}))


def test_bigbench_reads_targets_and_scores(tmp_path: Path) -> None:
    scored = bigbench(
        tmp_path / "riddles" / "task.json",
        {"input": "q1", "target_scores": {"a": 0, "b": 1}},
        {"input": "q2", "target_scores": {"c": 0.7, "d": 0.2}},
    )
    task = read_one(kind="bigbench", paths=[str(tmp_path)])
    assert (task.kind, task.heldout_only) == ("multiple_choice", True)
    assert texts(task) == [("q1", "b"), ("q2", "c")]
    assert task.options_of(task.examples[1]) == ("c", "d")
    bigbench(Path(scored), {"input": "q", "target": ["one", "1"]}, {"input": "p", "target": "two"})
    task = read_one(kind="bigbench", paths=[scored])
    assert (task.kind, texts(task)) == ("generation", [("q", "one"), ("p", "two")])


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"input": "q", "target_scores": {"a": 1, "b": 1}}, "example 2: 2 options share the highe"),
        ({"input": "q", "target_scores": ["a"]}, "example 2: 'target_scores' has to give each"),
        ({"input": "q", "target": []}, "example 2: expected 'target' (a text or a list)"),
        ({"input": "q", "target": "a"}, "example 2: task 'riddles': no options, and a multiple"),
        ({"target": "a"}, "example 2: expected a text 'input', got only target"),
        ("q", "example 2: got a str, expected an object"),
    ],
)
def test_bad_bigbench_examples(example: object, message: str, tmp_path: Path) -> None:
    good = {"input": "q", "target_scores": {"a": 1, "b": 0}}
    path = bigbench(tmp_path / "task.json", good, example)
    assert message in refusal(kind="bigbench", paths=[path])


def test_bad_bigbench_files(tmp_path: Path) -> None:
    path = write(tmp_path / "task.json", '{"name": "x",\n "examples": }')
    assert "task.json: not valid JSON (Expecting value" in refusal(kind="bigbench", paths=[path])
    path = write(tmp_path / "task.json", '{"name": "x"}')
    assert "task.json: no 'examples'" in refusal(kind="bigbench", paths=[path])


def facts(path: Path, pairs: list[tuple[str, str]], relation: str | None = None) -> str:
    named = {} if relation is None else {"predicate_id": relation}
    return jsonl(path, *({"sub_label": a, "obj_label": b} | named for a, b in pairs))


def templates(path: Path, *pairs: tuple[str, str]) -> str:
    return jsonl(path, *({"relation": name, "template": text} for name, text in pairs))


@pytest.mark.parametrize(
    ("template", "wording"),
    [
        ("[X] was born in [Y] .", "[X] was born in"),
        ("[X] was born in [Y].", "[X] was born in"),
        ("The capital of [X] is [Y]", "The capital of [X] is"),
        ("[Y] is the capital of [X] .", None),
        ("[X] is [Y] today .", None),
        ("[X] is Paris .", None),
        ("[X] is in [Y] or [Y] .", None),
        ("[X], like [X], is [Y]", None),
        ('[X] is "[Y]', None),
        ("[Y]", None),
    ],
)
def test_a_decoder_takes_templates_that_end_in_the_label(
    template: str, wording: str | None
) -> None:
    assert wording_of(template) == wording


def test_lama_words_every_fact_in_every_template(tmp_path: Path) -> None:
    facts(tmp_path / "capital.jsonl", COUNTRIES)
    facts(tmp_path / "more.jsonl", [("France", "Europe"), ("Peru $1", "Americas")], "continent")
    file = templates(
        tmp_path / "relations.jsonl",
        ("capital", "The capital of [X] is [Y] ."),
        ("capital", "[Y] is the capital of [X] ."),
        ("capital", "[X]: [Y]"),
        ("continent", "[X] is in [Y]"),
        ("unused", "[X] [Y]"),
    )
    counts: Counter[str] = Counter()
    settings = {"kind": "lama", "paths": [str(tmp_path)], "templates": file}
    capital, continent = read_tasks([source(**settings)], counts)
    assert capital.examples[0].inputs == ("The capital of France is", "France:")
    assert capital.options == ("Lima", "N'Djamena", "Paris", "Rome")
    assert (continent.name, continent.examples[1].inputs) == ("continent", ("Peru $1 is in",))
    assert counts["template_not_usable"] == 1
    shared = read(**settings, labels="shared")
    assert [task.options for task in shared] == [
        ("Americas", "Europe", "Lima", "N'Djamena", "Paris", "Rome")
    ] * 2
    names = [entry["name"] for entry in source(**settings).identity()]
    assert names == ["capital.jsonl", "more.jsonl", "relations.jsonl"]


def test_lama_refusals(tmp_path: Path) -> None:
    path = facts(tmp_path / "capital.jsonl", COUNTRIES)
    file = templates(tmp_path / "t.jsonl", ("capital", "[Y] is the capital of [X]"))
    settings = {"kind": "lama", "paths": [path], "templates": file}
    assert "relation 'capital' has no template that holds [X] once" in refusal(**settings)
    templates(tmp_path / "t.jsonl", ("capital", "The capital of [X] is [Y]"))
    facts(tmp_path / "capital.jsonl", [*COUNTRIES, ("Spain", " ")])
    assert "capital.jsonl:5: task 'capital': empty answer" in refusal(**settings)
    facts(tmp_path / "capital.jsonl", [*COUNTRIES, ("", "Madrid")])
    assert "capital.jsonl:5: task 'capital': empty input" in refusal(**settings)


ROWS = {"premise": ["p1", "p2", "p3"], "hypothesis": ["h1", "h2", "h3"], "label": [0, 1, 0]}
MAPPING: dict[str, Any] = {
    "kind": "rows",
    "name": "pairs",
    "task_kind": "classification",
    "input": ["premise", "hypothesis"],
    "output": "label",
}


def write_table(folder: Path, form: str) -> dict[str, Any]:
    table = pa.table(ROWS)
    path = folder / f"rows.{form}"
    if form == "jsonl":
        jsonl(path, *table.to_pylist())
    elif form == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as out:
            out.write_table(table)
    return {"kind": form, "paths": [str(path)]}


@pytest.mark.parametrize("form", ["jsonl", "parquet", "arrow"])
def test_columns_of_any_table_make_a_task(form: str, tmp_path: Path) -> None:
    settings = MAPPING | {"source": write_table(tmp_path, form)}
    task = read_one(**settings, label_names={0: "yes", 1: "no"})
    assert texts(task) == [("p1\nh1", "yes"), ("p2\nh2", "no"), ("p3\nh3", "yes")]
    assert (task.name, task.options) == ("pairs", ("no", "yes"))
    assert task.examples[1].place.endswith(f"rows.{form}:2")
    fixed = read_one(**settings, label_names={0: "yes", 1: "no"}, options=["yes", "no", "maybe"])
    assert fixed.options == ("yes", "no", "maybe")


def test_a_table_may_carry_its_label_names(tmp_path: Path) -> None:
    kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    table = datasets.Dataset.from_dict(
        {"text": ["a", "b"], "label": [1, 0]}, features=datasets.Features(kinds)
    )
    table.to_parquet(tmp_path / "rows.parquet")
    task = read_one(
        kind="rows",
        name="t",
        task_kind="classification",
        source={"kind": "parquet", "paths": [str(tmp_path / "rows.parquet")]},
        input="text",
        output="label",
    )
    assert texts(task) == [("a", "good"), ("b", "bad")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_names": {0: "yes"}}, "rows.jsonl:2: label 1 has no name in label_names; it names"),
        ({}, "rows.jsonl:1: expected a text 'label', got a int"),
        ({"input": "text"}, "rows.jsonl:1: expected a text 'text', got only premise, hypothesis"),
        (
            {"label_names": {0: "yes", 1: "no"}, "options": ["yes", "maybe"]},
            "rows.jsonl:2: task 'pairs': answer 'no' is not among the options ['yes', 'maybe']",
        ),
    ],
)
def test_bad_tables(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    settings = MAPPING | {"source": write_table(tmp_path, "jsonl")} | change
    assert message in refusal(**settings)


def test_rows_of_one_classification_task_share_their_options(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "rows.jsonl",
        {"text": "a", "label": "x", "choices": ["x", "y"]},
        {"text": "b", "label": "z", "choices": ["z", "y"]},
    )
    settings: dict[str, Any] = {
        "kind": "rows",
        "name": "t",
        "source": {"kind": "jsonl", "paths": [path]},
        "input": "text",
        "output": "label",
        "options": "choices",
    }
    line = refusal(**settings, task_kind="classification")
    assert (
        line.startswith("task 't' mixes label spaces: ") and "rows.jsonl:2 has ['z', 'y']" in line
    )
    task = read_one(**settings, task_kind="multiple_choice")
    assert [task.options_of(example) for example in task.examples] == [("x", "y"), ("z", "y")]
    with pytest.raises(ValidationError, match="multiple_choice needs 'options'"):
        source(**(settings | {"task_kind": "multiple_choice", "options": None}))


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", metaicl("t", "a", "b", []))
    chosen = source(kind="metaicl", paths=[path])
    with pytest.raises(ConfigError, match="task 't' comes from 2 sources; rename one"):
        read_tasks([chosen, chosen], Counter())
    with pytest.raises(ConfigError, match="no file matches"):
        read(kind="metaicl", paths=[str(tmp_path / "none*")])
