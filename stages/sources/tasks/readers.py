"""Raw task files -> tasks whose examples are checked and distinct.

CrossFit's inputs may hold a literal `` [SEP] `` between two texts: it stays. Of several answers (a
CrossFit line's further columns, a BIG-bench ``target`` that is a list) the first is the answer, and
the others are counted as ``further_answers``; labels are one each. A BIG-bench example with
``target_scores`` has the option of the highest score for its answer, and none where two share it
(``tied_best_options``). A BIG-bench task without examples is the parent of subtasks, which have
files of their own (``parent_of_subtasks``).
"""

from collections import Counter
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError
from stages.sources.reading.lines import (
    bytes_of,
    field_of,
    json_lines,
    json_object,
    shown,
    text_lines,
    text_of,
    texts_of,
    valid,
)
from stages.sources.reading.records import read_records
from stages.sources.reading.rejects import MalformedRecord, Rejects, UnusableRecord
from stages.sources.tasks.lama import read_lama
from stages.sources.tasks.sources import (
    CROSSFIT_NAME,
    BigBenchFiles,
    CrossFitFiles,
    LamaFiles,
    MetaIclFiles,
    TableRows,
    TaskSource,
)
from stages.sources.tasks.task import Example, Task, kind_by_options, make_task


def read_tasks(sources: Sequence[TaskSource], rejects: Rejects) -> list[Task]:
    """Return all tasks by name; ``rejects`` takes what was left out.

    Raises ConfigError for a source of which every record is malformed, for two tasks of one name,
    and where there is no example at all.
    """
    tasks: list[Task] = []
    for source in sources:
        with rejects.of_source() as own:
            tasks += [task for task in _tasks_of(source, own) if task is not None]
    if not tasks:
        left_out = ", ".join(f"{why} {count}" for why, count in sorted(rejects.counts.items()))
        raise ConfigError(
            f"sources: their files hold no example (rejected: {left_out or 'none was read'})"
        )
    names = Counter(task.name for task in tasks)
    again = [name for name, count in names.items() if count > 1]
    if again:
        raise ConfigError(
            f"task '{again[0]}' comes from {names[again[0]]} sources; rename one, or leave one out"
        )
    return sorted(tasks, key=lambda task: task.name)


def _tasks_of(source: TaskSource, rejects: Rejects) -> list[Task | None]:
    match source:
        case CrossFitFiles():
            return _read_crossfit(source, rejects)
        case MetaIclFiles():
            return _read_metaicl(source, rejects)
        case BigBenchFiles():
            return [_read_bigbench(path, rejects) for path in source.files()]
        case LamaFiles():
            return read_lama(source, rejects)
        case TableRows():
            return [read_table(source, rejects)]


def _read_crossfit(source: CrossFitFiles, rejects: Rejects) -> list[Task | None]:
    examples: dict[str, list[Example]] = {}
    for path in source.files():
        name = CROSSFIT_NAME.fullmatch(path.name)
        assert name is not None, "the source has checked it"
        rows = examples.setdefault(name["task"], [])
        for place, line in text_lines(path, rejects):
            with rejects.passing(place):
                rows.append(_crossfit_row(source, line, place, rejects))
    return [
        make_task(name, source.task_kind, rows, rejects=rejects) for name, rows in examples.items()
    ]


def _crossfit_row(source: CrossFitFiles, line: str, place: str, rejects: Rejects) -> Example:
    text, *answers = line.split("\t")
    if not answers or (len(answers) > 1 and source.task_kind == "classification"):
        raise MalformedRecord(
            "other_columns",
            f"got {1 + len(answers)} columns, expected 2: input, a tab, output",
        )
    rejects.counts["further_answers"] += len(answers) - 1
    return Example((text,), answers[0], (), place)


def _read_metaicl(source: MetaIclFiles, rejects: Rejects) -> list[Task | None]:
    examples: dict[str, list[Example]] = {}
    for path in source.files():
        for place, record in json_lines(path, rejects):
            with rejects.passing(place):
                task, text, output = (text_of(record, n) for n in ("task", "input", "output"))
                if not task.strip():
                    raise UnusableRecord("empty_task", "'task' is empty, expected a name")
                row = Example((text,), output, texts_of(record, "options"), place)
                examples.setdefault(task, []).append(row)
    return [
        make_task(name, kind_by_options(rows), rows, rejects=rejects)
        for name, rows in examples.items()
    ]


def _read_bigbench(path: Path, rejects: Rejects) -> Task | None:
    rows: list[Example] = []
    with rejects.passing(str(path)):
        rejects.num_read += 1
        body = json_object(bytes_of(path))
        name, records = text_of(body, "name"), _examples_of(body)
        rejects.num_read += len(records) - 1
        for number, record in enumerate(records, 1):
            place = f"{path}: example {number}"
            with rejects.passing(place):
                rows.append(_bigbench_row(record, place, rejects))
        kind = "generation" if kind_by_options(rows) == "generation" else "multiple_choice"
        return make_task(name, kind, rows, rejects=rejects, heldout_only=True)
    return None


def _examples_of(body: dict[str, Any]) -> list[Any]:
    records = body.get("examples")
    if not records and (records == [] or "examples" not in body):
        raise UnusableRecord("parent_of_subtasks", "it has no examples of its own")
    if not isinstance(records, list):
        raise MalformedRecord("bad_examples", f"'examples' is {shown(records)}, expected a list")
    return records


def _bigbench_row(record: Any, place: str, rejects: Rejects) -> Example:
    if not isinstance(record, dict):
        raise MalformedRecord("not_an_object", f"got {shown(record)}, expected an object")
    text = text_of(record, "input")
    scores = record.get("target_scores")
    if scores is not None:
        return Example((text,), _best(scores), tuple(scores), place)
    target = field_of(record, "target", "a text or a list of texts")
    answers = target if isinstance(target, list) else [target]
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise MalformedRecord(
            "not_a_string", f"'target' is {shown(target)}, expected a text or a list of texts"
        )
    rejects.counts["further_answers"] += len(answers) - 1
    return Example((text,), valid(answers[0], "target"), (), place)


def _best(scores: Any) -> str:
    is_table = isinstance(scores, dict) and bool(scores)
    if not is_table or not all(_is_number(score) for score in scores.values()):
        raise MalformedRecord(
            "bad_scores", f"'target_scores' is {shown(scores)}, expected a number for each option"
        )
    most = max(scores.values())
    best = [option for option, score in scores.items() if score == most]
    if len(best) != 1:
        raise UnusableRecord(
            "tied_best_options",
            f"{len(best)} options share the highest of 'target_scores', expected one",
        )
    return str(best[0])


def _is_number(value: object) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and not isnan(value))


def read_table(source: TableRows, rejects: Rejects) -> Task | None:
    """Return the task; raises ConfigError where the table has no row."""
    rows = []
    for place, record in read_records(source.source, rejects):
        with rejects.passing(place):
            rows.append(_example(source, place, record))
    if not rejects.num_read:
        raise ConfigError(f"task '{source.name}': its source holds no row")
    fixed = source.options if isinstance(source.options, tuple) else ()
    return make_task(source.name, source.task_kind, rows, rejects=rejects, options=fixed)


def _example(source: TableRows, place: str, record: dict[str, Any]) -> Example:
    text = "\n".join(text_of(record, column) for column in source.input_columns)
    options = texts_of(record, source.options) if isinstance(source.options, str) else ()
    return Example((text,), _output(source, record), options, place)


def _output(source: TableRows, record: dict[str, Any]) -> str:
    value = record.get(source.output)
    if source.label_names is None or not isinstance(value, int) or isinstance(value, bool):
        return text_of(record, source.output)
    if value not in source.label_names:
        raise MalformedRecord(
            "unnamed_label",
            f"label {value} has no name in label_names; it names {sorted(source.label_names)}",
        )
    return source.label_names[value]
