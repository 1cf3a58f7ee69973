"""LAMA's facts and relation templates as tasks for a decoder: a variant of ours.

LAMA (and In-context Learning Distillation on it, arXiv 2212.10670) has a masked model fill ``[Y]``
wherever it stands. A decoder can only be asked for what comes last, so here

- a final full stop after ``[Y]`` is cut, with the space before it,
- templates in which ``[Y]`` is still not last, or is glued to the word before it, are left out
  (counted as ``template_not_usable``), and with them the facts of a relation that has no other
  (``relation_without_template``: five of LAMA's own relations).

The input is the template up to ``[Y]``; the space that follows is the episode template's business
(``lama``: "{input} {output}"). Each template is one wording of every fact of its relation, and an
episode uses one wording throughout.
"""

import re
from pathlib import Path

import polars as pl

from schemas.errors import ConfigError
from stages.sources.reading.lines import json_lines, text_of
from stages.sources.reading.rejects import Rejects, UnusableRecord
from stages.sources.tasks.sources import LamaFiles
from stages.sources.tasks.task import Example, Task, make_task

SUBJECT, LABEL = "[X]", "[Y]"
_FULL_STOP = re.compile(r"\s*\.\s*$")
_FACTS = dict.fromkeys(("relation", "subject", "label", "place"), pl.String)
_TEMPLATES = dict.fromkeys(("relation", "wording"), pl.String)


def read_lama(source: LamaFiles, rejects: Rejects) -> list[Task | None]:
    """Return one task a relation that has a usable template; raises ConfigError where none has."""
    with rejects.of_source() as own:
        templates = _read_templates(source.template_file(), own)
    with rejects.of_source() as own:
        facts = _read_facts(source.files(), own)
    worded = _word(facts, templates)
    if facts.height and not worded.height:
        raise ConfigError(
            f"{source.template_file()}: no relation of these facts (such as "
            f"'{facts['relation'][0]}') has a template that holds {SUBJECT} once and ends in "
            f"' {LABEL}'; add some"
        )
    bare = facts.join(templates, on="relation", how="anti", maintain_order="left")
    for place, relation in bare.select("place", "relation").iter_rows():
        detail = f"relation '{relation}' has no template that ends in ' {LABEL}'"
        rejects.add(place, UnusableRecord("relation_without_template", detail))
    labels = tuple(worded["label"].unique().sort()) if source.labels == "shared" else ()
    return [
        make_task(name, "classification", _examples(rows), rejects=rejects, options=labels)
        for (name,), rows in worded.partition_by(
            "relation", as_dict=True, maintain_order=True
        ).items()
    ]


def wording_of(template: str) -> str | None:
    """Return a template up to its label, or None where a decoder cannot use it."""
    text = template.rstrip()
    if not text.endswith(LABEL):
        text = _FULL_STOP.sub("", text)
    head = text.removesuffix(LABEL)
    usable = head != text and head.endswith(" ") and LABEL not in head
    return head.rstrip() if usable and head.count(SUBJECT) == 1 else None


def _read_facts(files: tuple[Path, ...], rejects: Rejects) -> pl.DataFrame:
    rows = []
    for path in files:
        for place, record in json_lines(path, rejects):
            with rejects.passing(place):
                named = "predicate_id" in record
                relation = text_of(record, "predicate_id") if named else path.stem
                subject, label = (text_of(record, name) for name in ("sub_label", "obj_label"))
                if not subject.strip():  # the wording around it would hide that
                    raise UnusableRecord("empty_input", "'sub_label' is empty")
                if not label.strip():  # it would be an option of every other fact
                    raise UnusableRecord("empty_answer", "'obj_label' is empty")
                rows.append((relation, subject, label, place))
    return pl.DataFrame(rows, schema=_FACTS, orient="row")


def _read_templates(path: Path, rejects: Rejects) -> pl.DataFrame:
    rows = []
    for place, record in json_lines(path, rejects):
        with rejects.passing(place):
            relation, template = text_of(record, "relation"), text_of(record, "template")
            wording = wording_of(template)
            if wording is None:
                raise UnusableRecord(
                    "template_not_usable",
                    f"{template[:60]!r} does not hold {SUBJECT} once and end in ' {LABEL}'",
                )
            rows.append((relation, wording))
    return pl.DataFrame(rows, schema=_TEMPLATES, orient="row").unique(maintain_order=True)


def _word(facts: pl.DataFrame, templates: pl.DataFrame) -> pl.DataFrame:
    """Return the facts, in order, each with its subject put in every wording of its relation."""
    joined = facts.with_row_index().join(templates, on="relation", maintain_order="left_right")
    worded = pl.col("wording").str.replace_all(SUBJECT, pl.col("subject"), literal=True)
    groups = joined.group_by("index", maintain_order=True)
    first = (pl.first(name) for name in _FACTS)
    return groups.agg(*first, worded.alias("inputs"))


def _examples(rows: pl.DataFrame) -> list[Example]:
    columns = (rows[name].to_list() for name in ("inputs", "label", "place"))
    return [
        Example(tuple(inputs), label, (), place)
        for inputs, label, place in zip(*columns, strict=True)
    ]
