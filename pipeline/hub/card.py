"""The card of published tables: what they are, what made them, how they are read."""

from collections.abc import Mapping
from typing import Any

import yaml

from pipeline.state.audit_verdict import AuditVerdict
from schemas.storage.manifest import Manifest
from schemas.tables.documents import SPLITS

CARD = "README.md"
_CARD = """---
{front}---

# {title}

What a teacher model says of texts, written once for the training of students by teachercache.

| table | rows | tokens | scored positions | bytes | B/token | rejected |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

{teacher}{made_by}{audits}

## Reading it

`teachercache fetch {name} data` brings the tables to a folder and verifies every checksum; then,
joined by `sample_id`:

```python
from teachercache import open_dataset

tables = [
{places}]
rows = open_dataset(tables, split="train")
```

Without it, a table's bare columns (`schema.json` beside the shards says what each of them is):

```python
from datasets import load_dataset

rows = load_dataset("{name}", "{first}", split="train")
```
"""


def card_of(
    name: str,
    tables: Mapping[str, Manifest],
    *,
    licence: str | None,
    teacher: str | None,
    audits: Mapping[str, str] | None = None,
) -> str:
    """Return the card of tables by their folder in the data set; nothing of this machine is in it.

    ``audits`` are lines on audits of these very tables, by folder (``audit_line``). The front
    matter names each shard, so ``datasets.load_dataset`` reads a table by its name.
    """
    given = {"license": licence, "teacher": teacher}
    front: dict[str, Any] = {key: value for key, value in given.items() if value}
    front["tags"] = ["teachercache", "knowledge-distillation"]
    front["configs"] = [_config(place, manifest) for place, manifest in tables.items()]
    return _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        name=name,
        title=name.partition("/")[2],
        rows="\n".join(_row(place, manifest) for place, manifest in tables.items()),
        teacher=f"Teacher, as its publisher names it: {teacher}.\n\n" if teacher else "",
        made_by="\n".join(
            dict.fromkeys(line for manifest in tables.values() for line in _models(manifest))
        ),
        audits="".join(f"\n{line}" for _, line in sorted((audits or {}).items())),
        places="".join(f'    "data/{place}",\n' for place in tables),
        first=_config_name(next(iter(tables))),
    )


def given_in(card: str) -> tuple[str | None, str | None]:
    """Return the licence and the teacher that a card names, so that a later one keeps them."""
    parts = card.split("---\n", 2)
    front = yaml.safe_load(parts[1]) if len(parts) == 3 else {}
    return front.get("license"), front.get("teacher")


def audits_in(card: str) -> dict[str, str]:
    """Return the lines on audits that a card has, by table, so that a later one keeps them."""
    lines = [
        line for line in card.splitlines() if line.startswith("- `") and "` audited on" in line
    ]
    return {line.split("`")[1]: line for line in lines}


def _config_name(place: str) -> str:
    return place.replace("/", "-")


def _config(place: str, manifest: Manifest) -> dict[str, Any]:
    files = {
        split: [f"{place}/{shard.file}" for shard in manifest.shards if shard.split == split]
        for split in SPLITS
    }
    there = [{"split": split, "path": paths} for split, paths in files.items() if paths]
    return {"config_name": _config_name(place), "data_files": there}


def _row(place: str, manifest: Manifest) -> str:
    kind = f" ({manifest.variant})" if manifest.variant else ""
    rejected = ", ".join(f"{count} {why}" for why, count in manifest.rejects.items()) or "0"
    density = f"{manifest.num_bytes / manifest.num_tokens:.1f}" if manifest.num_tokens else "-"
    counts = (manifest.num_rows, manifest.num_tokens, manifest.num_positions, manifest.num_bytes)
    cells = [f"`{place}`{kind}", *(f"{count:,}" for count in counts), density, rejected]
    return f"| {' | '.join(cells)} |"


def audit_line(place: str, verdict: AuditVerdict) -> str:
    """Say in the card what an audit found of a table."""
    return (
        f"- `{place}` audited on {verdict.audited_at[:10]}: {verdict.num_rows:,} rows "
        f"({verdict.num_positions:,} positions) made again by the live teacher with "
        f"{verdict.engine}: {verdict.outcome}."
    )


def _models(manifest: Manifest) -> list[str]:
    """Return a line a model that made a table: architecture, dtype, engine, weights by checksum."""
    config = manifest.identity.get("config", {})
    how = ", ".join(f"{key} {value}" for key, value in sorted(config.get("encoding", {}).items()))
    lines = []
    for model in manifest.identity.get("models", ()):
        names = model.get("config", {}).get("architectures") or ["a model"]
        weights = ", ".join(f"`{digest}`" for digest in model.get("weights", {}).values())
        lines.append(
            f"- `{manifest.table}`{f' ({how})' if how else ''}: {names[0]} in {model.get('dtype')} "
            f"by {model.get('engine')}; sha256 of its weights {weights or 'not recorded'}."
        )
    return lines
