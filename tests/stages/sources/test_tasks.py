"""Task files of every kind give the same checked examples; a bad row is counted by its reason."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter, ValidationError

from schemas.errors import ConfigError
from stages.sources.reading.rejects import Rejects
from stages.sources.tasks.lama import wording_of
from stages.sources.tasks.readers import read_tasks
from stages.sources.tasks.sources import TaskSource
from stages.sources.tasks.task import Task

COUNTRIES = [("France", "Paris"), ("Italy", "Rome"), ("Peru", "Lima"), ("Chad", "N'Djamena")]


def source(**settings: Any) -> TaskSource:
    return TypeAdapter(TaskSource).validate_python(settings)


def read(**settings: Any) -> list[Task]:
    return read_tasks([source(**settings)], Rejects())


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


def rejected(**settings: Any) -> tuple[list[Task], dict[str, int], list[str]]:
    """Read tasks among bad rows: the tasks, counts by reason, and a line for each listed row."""
    rejects = Rejects()
    tasks = read_tasks([source(**settings)], rejects)
    lines = [f"{row['place']}: {row['detail']}" for row in rejects.listed]
    assert all("\n" not in line for line in lines)
    return tasks, {why: count for why, count in rejects.counts.items() if count}, lines


def crossfit(folder: Path, name: str, rows: list[tuple[str, str]]) -> str:
    return write(folder / name, "".join(f"{a}\t{b}\n" for a, b in rows))


def texts(task: Task) -> list[tuple[str, str]]:
    return [(example.inputs[0], example.output) for example in task.examples]


def test_crossfit_merges_seeds_and_splits_of_a_task(tmp_path: Path) -> None:
    rows = [("a [SEP] b", "yes"), ("c", " no"), ("d\u2028e", "yes")]
    for seed, split, part in ((13, "train", rows[:2]), (21, "dev", rows[1:]), (42, "test", rows)):
        crossfit(tmp_path / "glue-x", f"glue-x_16_{seed}_{split}.tsv", part)
    rejects = Rejects()
    chosen = source(kind="crossfit", paths=[str(tmp_path / "*")], task_kind="classification")
    (task,) = read_tasks([chosen], rejects)
    assert (task.name, task.kind, task.options) == ("glue-x", "classification", (" no", "yes"))
    assert texts(task) == rows
    assert rejects.counts == {"duplicate_example": 1}
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
    ("row", "reason", "message"),
    [
        ("b no", "other_columns", ":2: got 1 columns, expected 2: input, a tab, output"),
        ("a\tyes\tb", "other_columns", ":2: got 3 columns, expected 2"),
        (" \tno", "empty_input", ":2: the input is empty"),
        ("b\t ", "empty_answer", ":2: the answer is empty"),
        ("b\t\ud800", "invalid_unicode", ":2: byte 3 is not UTF-8"),
    ],
)
def test_bad_crossfit_rows(row: str, reason: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t_16_13_train.tsv", f"a\tyes\n{row}\n\nb\tno\n")
    (task,), counts, lines = rejected(kind="crossfit", paths=[path], task_kind="classification")
    assert texts(task) == [("a", "yes"), ("b", "no")]
    assert counts == {reason: 1}
    assert len(lines) == 1 and message in lines[0]


def test_of_several_answers_the_first_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "t_16_13_test.tsv", "who?\tshe\ther\tMs. X\nwhat?\tit\n")
    (task,), counts, _ = rejected(
        kind="crossfit", paths=[path], task_kind="generation", splits=["test"]
    )
    assert texts(task) == [("who?", "she"), ("what?", "it")]
    assert counts == {"further_answers": 2}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("a\tyes\nb\tyes\n", "task 't': ['yes'] is its only label"),
        ("", "sources: their files hold no example (rejected: task_without_examples 1)"),
        ("a yes\nb no\n", "t_16_13_train.tsv:1: got 1 columns, expected 2: input, a tab, output"),
    ],
)
def test_crossfit_files_that_are_wrong_as_a_whole(body: str, message: str, tmp_path: Path) -> None:
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
    assert [set(quiz.options_of(example)) for example in quiz.examples] == [
        {"he", "she"},
        {"it", "that", "this"},
    ]


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        ('{"task": "t", "input": "a"', "broken_json", "not valid JSON (Expecting ',' delimiter at"),
        ("[1]", "not_an_object", "got a JSON list, expected an object"),
        (
            '{"task": "t", "output": "a"}',
            "missing_column",
            "no column 'input'; it has 'task', 'out",
        ),
        (
            '{"task": "t", "input": null, "output": "a"}',
            "missing_text",
            "'input' is null, expected",
        ),
        (
            '{"task": "t", "input": 3, "output": "a"}',
            "not_a_string",
            "'input' is a int: 3, expecte",
        ),
        (
            '{"task": "t", "input": "b", "output": "z", "options": ["x", "y", "w"]}',
            "answer_not_an_option",
            "answer 'z' is not among the options ['x', 'y', 'w']",
        ),
        (
            '{"task": "t", "input": "b", "output": "x", "options": ["x", "x", "y"]}',
            "repeated_option",
            "option 'x' is there twice",
        ),
        (
            '{"task": "t", "input": "b", "output": "x", "options": ["x", " "]}',
            "empty_option",
            "an option of ['x', ' '] is empty",
        ),
        (
            '{"task": "t", "input": "b", "output": "x"}',
            "no_options",
            "no options, and a multiple_c",
        ),
        (
            '{"task": "t", "input": "b", "output": "x", "options": "x"}',
            "not_a_list_of_texts",
            "'options' is a str: 'x', expected a list of texts",
        ),
        (
            '{"task": "t", "input": "\\ud800", "output": "x", "options": ["x", "y"]}',
            "invalid_unicode",
            "'input' is not valid Unicode",
        ),
    ],
)
def test_bad_metaicl_rows(line: str, reason: str, message: str, tmp_path: Path) -> None:
    good = [json.dumps(metaicl("t", "a", "x", ["x", other])) for other in ("y", "z")]
    path = write(tmp_path / "t.jsonl", f"{good[0]}\n{line}\n{good[1]}\n")
    (task,), counts, lines = rejected(kind="metaicl", paths=[path])
    assert (task.kind, len(task.examples), counts) == ("multiple_choice", 2, {reason: 1})
    assert len(lines) == 1 and f"t.jsonl:2: {message}" in lines[0]


def test_one_row_does_not_change_what_a_task_is(tmp_path: Path) -> None:
    rows = [metaicl("nli", f"p {number}", "yes", ["yes", "no"]) for number in range(9)]
    bare = [metaicl("sum", f"long {number}", "short", []) for number in range(9)]
    path = jsonl(
        tmp_path / "t.jsonl",
        *rows,
        metaicl("nli", "q", "yes", []),
        *bare,
        metaicl("sum", "r", "short", ["short", "long"]),
    )
    (nli, summary), counts, _ = rejected(kind="metaicl", paths=[path])
    assert (nli.kind, nli.options, len(nli.examples)) == ("classification", ("yes", "no"), 9)
    assert (summary.kind, len(summary.examples)) == ("generation", 9)
    assert counts == {"no_options": 1, "unexpected_options": 1}


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
    assert set(task.options_of(task.examples[1])) == {"c", "d"}
    bigbench(Path(scored), {"input": "q", "target": ["one", "1"]}, {"input": "p", "target": "two"})
    task = read_one(kind="bigbench", paths=[scored])
    assert (task.kind, texts(task)) == ("generation", [("q", "one"), ("p", "two")])


@pytest.mark.parametrize(
    ("example", "reason", "message"),
    [
        (
            {"input": "q", "target_scores": {"a": 1, "b": 1}},
            "tied_best_options",
            "2 options share the highest of 'target_scores'",
        ),
        ({"input": "", "target_scores": {"a": 1, "b": 0}}, "empty_input", "the input is empty"),
        ({"input": "q", "target_scores": ["a"]}, "bad_scores", "'target_scores' is a list: ['a']"),
        ({"input": "q", "target_scores": {}}, "bad_scores", "'target_scores' is a dict: {}"),
        (
            {"input": "q", "target_scores": {"a": float("nan"), "b": 0}},
            "bad_scores",
            "'target_scores' is a dict: {'a': nan, 'b': 0}, expected a number for each option",
        ),
        ({"input": "q", "target_scores": {"a": "1"}}, "bad_scores", "'target_scores' is a d"),
        ({"input": "q", "target_scores": {"a": 10**400, "b": "0"}}, "bad_scores", "'target_scores"),
        ({"input": "q", "target": []}, "not_a_string", "'target' is a list: [], expected a text"),
        ({"input": "q", "target": "a"}, "no_options", "no options, and a multiple_choice row"),
        ({"target": "a"}, "missing_column", "no column 'input'; it has 'target'"),
        ("q", "not_an_object", "got a str: 'q', expected an object"),
        (None, "not_an_object", "got a NoneType: None, expected an object"),
    ],
)
def test_bad_bigbench_examples(example: object, reason: str, message: str, tmp_path: Path) -> None:
    good = [{"input": text, "target_scores": {"a": 1, "b": 0}} for text in ("p", "r")]
    path = bigbench(tmp_path / "task.json", good[0], example, good[1])
    (task,), counts, lines = rejected(kind="bigbench", paths=[path])
    assert (texts(task), counts) == ([("p", "a"), ("r", "a")], {reason: 1})
    assert len(lines) == 1 and f"task.json: example 2: {message}" in lines[0]


def test_a_score_too_long_for_a_float_is_a_number(tmp_path: Path) -> None:
    path = bigbench(tmp_path / "task.json", {"input": "p", "target_scores": {"a": 0, "b": 10**400}})
    assert texts(read_one(kind="bigbench", paths=[path])) == [("p", "b")]


def test_a_bigbench_file_that_is_no_task_costs_itself_alone(tmp_path: Path) -> None:
    bigbench(tmp_path / "good" / "task.json", {"input": "p", "target": "a"})
    write(tmp_path / "broken" / "task.json", '{"name": "x",\n "examples": }')
    write(tmp_path / "parent" / "task.json", '{"name": "arithmetic", "examples": []}')
    write(tmp_path / "strange" / "task.json", '{"name": "x", "examples": {"input": "p"}}')
    (task,), counts, lines = rejected(kind="bigbench", paths=[str(tmp_path)])
    assert texts(task) == [("p", "a")]
    assert counts == {"broken_json": 1, "parent_of_subtasks": 1, "bad_examples": 1}
    assert any("task.json: not valid JSON (Expecting value" in line for line in lines)
    assert "not valid JSON" in refusal(kind="bigbench", paths=[str(tmp_path / "broken")])
    line = refusal(kind="bigbench", paths=[str(tmp_path / "parent")])
    assert line == "sources: their files hold no example (rejected: parent_of_subtasks 1)"


def test_where_an_option_stands_in_the_file_says_nothing(tmp_path: Path) -> None:
    rows = [
        {"input": f"q{number}", "target_scores": {f"a{number}": 1, "b": 0, "c": 0, "d": 0}}
        for number in range(400)
    ]
    task = read_one(kind="bigbench", paths=[bigbench(tmp_path / "task.json", *rows)])
    places = [task.options_of(example).index(example.output) for example in task.examples]
    assert all(70 <= places.count(place) <= 130 for place in range(4))
    turned = [
        row | {"target_scores": dict(reversed(row["target_scores"].items()))}  # type: ignore[attr-defined]
        for row in rows
    ]
    again = read_one(kind="bigbench", paths=[bigbench(tmp_path / "task.json", *turned)])
    assert again.examples == task.examples


def test_equal_questions_with_other_options_are_no_duplicates(tmp_path: Path) -> None:
    path = bigbench(
        tmp_path / "task.json",
        {"input": "Which is so?", "target_scores": {"yes": 1, "no": 0}},
        {"input": "Which is so?", "target_scores": {"yes": 1, "perhaps": 0}},
        {"input": "Which is so?", "target_scores": {"perhaps": 0, "yes": 1}},
        {"input": "Which is so?", "target_scores": {"perhaps": 1, "yes": 0}},
    )
    (task,), counts, _ = rejected(kind="bigbench", paths=[path])
    assert [set(example.options) for example in task.examples] == [
        {"yes", "no"},
        {"yes", "perhaps"},
        {"yes", "perhaps"},
    ]
    assert counts == {"duplicate_example": 1}


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
    settings = {"kind": "lama", "paths": [str(tmp_path)], "templates": file}
    (capital, continent), counts, _ = rejected(**settings)
    assert capital.examples[0].inputs == ("The capital of France is", "France:")
    assert capital.options == ("Lima", "N'Djamena", "Paris", "Rome")
    assert (continent.name, continent.examples[1].inputs) == ("continent", ("Peru $1 is in",))
    assert counts == {"template_not_usable": 1}
    shared = read(**settings, labels="shared")
    assert [task.options for task in shared] == [
        ("Americas", "Europe", "Lima", "N'Djamena", "Paris", "Rome")
    ] * 2
    names = [entry["name"] for entry in source(**settings).identity()]
    assert names == ["capital.jsonl", "more.jsonl", "relations.jsonl"]


def test_a_relation_without_a_template_is_left_out(tmp_path: Path) -> None:
    capital = facts(tmp_path / "capital.jsonl", [*COUNTRIES, ("Spain", " "), ("", "Madrid")])
    twins = facts(tmp_path / "twins.jsonl", COUNTRIES)
    file = templates(
        tmp_path / "t.jsonl",
        ("capital", "The capital of [X] is [Y]"),
        ("twins", "[X] and [Y] are twin cities ."),
    )
    settings = {"kind": "lama", "paths": [capital, twins], "templates": file}
    (task,), counts, lines = rejected(**settings, labels="shared")
    assert (task.name, task.options) == ("capital", ("Lima", "N'Djamena", "Paris", "Rome"))
    assert counts == {
        "empty_answer": 1,
        "empty_input": 1,
        "relation_without_template": 4,
        "template_not_usable": 1,
    }
    assert any("capital.jsonl:5: 'obj_label' is empty" in line for line in lines)
    line = refusal(**settings | {"paths": [twins]})
    assert "no relation of these facts (such as 'twins') has a template that holds [X]" in line


def test_lama_files_that_are_wrong_as_a_whole_are_said_with_their_columns(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "facts.jsonl", {"sub": "France", "obj": "Paris"}, {"sub": "Peru"})
    file = templates(tmp_path / "t.jsonl", ("facts", "The capital of [X] is [Y]"))
    line = refusal(kind="lama", paths=[path], templates=file)
    assert "facts.jsonl:1: no column 'sub_label'; it has 'sub', 'obj'" in line
    jsonl(tmp_path / "t.jsonl", {"relation": "facts", "text": "The capital of [X] is [Y]"})
    line = refusal(kind="lama", paths=[path], templates=file)
    assert line.endswith("t.jsonl:1: no column 'template'; it has 'relation', 'text'")


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
        ({}, "rows.jsonl:1: 'label' is a int: 0, expected a text (so are all 3 records read)"),
        ({"input": "text"}, "rows.jsonl:1: no column 'text'; it has 'premise', 'hypothesis', 'lab"),
        ({"label_names": {2: "yes"}}, "rows.jsonl:1: label 0 has no name in label_names; it names"),
        (
            {"label_names": {0: "yes", 1: "no"}, "options": ["true", "maybe"]},
            "rows.jsonl:1: answer 'yes' is not among the options ['true', 'maybe'] (so are all 3",
        ),
        (
            {"label_names": {0: "yes", 1: "no"}, "options": ["yes", "yes"]},
            "task 'pairs': option 'yes' is there twice; remove one",
        ),
    ],
)
def test_tables_that_are_wrong_as_a_whole(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    settings = MAPPING | {"source": write_table(tmp_path, "jsonl")} | change
    assert message in refusal(**settings)


def test_bad_rows_of_a_table(tmp_path: Path) -> None:
    settings = MAPPING | {"source": write_table(tmp_path, "jsonl"), "label_names": {0: "yes"}}
    (task,), counts, lines = rejected(**settings, options=["yes", "no"])
    assert (len(task.examples), counts) == (2, {"unnamed_label": 1})
    assert "rows.jsonl:2: label 1 has no name in label_names; it names [0]" in lines[0]


def test_rows_of_one_classification_task_share_their_options(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "rows.jsonl",
        {"text": "a", "label": "x", "choices": ["x", "y"]},
        {"text": "b", "label": "z", "choices": ["z", "y"]},
        {"text": "c", "label": "y", "choices": ["y", "x"]},
    )
    settings: dict[str, Any] = {
        "kind": "rows",
        "name": "t",
        "source": {"kind": "jsonl", "paths": [path]},
        "input": "text",
        "output": "label",
        "options": "choices",
    }
    (task,), counts, lines = rejected(**settings, task_kind="classification")
    assert (task.options, len(task.examples), counts) == (("x", "y"), 2, {"other_options": 1})
    assert "rows.jsonl:2: its options are ['z', 'y'], and the task's are ['x', 'y']" in lines[0]
    task = read_one(**settings, task_kind="multiple_choice")
    assert [set(task.options_of(example)) for example in task.examples[:2]] == [
        {"x", "y"},
        {"z", "y"},
    ]
    with pytest.raises(ValidationError, match="multiple_choice needs 'options'"):
        source(**(settings | {"task_kind": "multiple_choice", "options": None}))


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", metaicl("t", "a", "b", []))
    chosen = source(kind="metaicl", paths=[path])
    with pytest.raises(ConfigError, match="task 't' comes from 2 sources; rename one"):
        read_tasks([chosen, chosen], Rejects())
    with pytest.raises(ConfigError, match="no file matches"):
        read(kind="metaicl", paths=[str(tmp_path / "none*")])
