"""Seconds of each shard of a real run: the real command on real text, read back from its records.

Rows are whole documents cut at 256 tokens, so that shards differ in tokens as they do in practice.
The tables lie under ``CACHE/benchmarks/shard_times`` by fingerprint: they are made once.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from benchmarks.training.cached_tables import MODEL
from schemas.storage.manifest import read_manifest
from schemas.storage.records import read_notes

F64Array = npt.NDArray[np.float64]
TEXTS = ("text/c4_demo.jsonl", "text/alpaca_en_demo.json")
ROWS_PER_SHARD, QUICK_ROWS = 5, 60
SMALL = "2 layers of SmolLM2-135M, transformers"
TEACHER = "SmolLM2-135M, vLLM"


@dataclass(frozen=True, slots=True)
class ShardTimes:
    """Input tokens and seconds of each shard of one step, [shards], in the order they were made."""

    tokens_S: F64Array
    seconds_S: F64Array

    @property
    def relative_S(self) -> F64Array:
        """Seconds over their mean."""
        return np.asarray(self.seconds_S / np.mean(self.seconds_S))


def shard_times(cache: Path, *, quick: bool = False) -> dict[str, ShardTimes]:
    """Run what has not been run yet; return the times by teacher. ``quick``: the small one's."""
    for needed in (MODEL, *TEXTS):
        if not (cache / needed).exists():
            raise SystemExit(
                f"{cache / needed} is missing: run `python examples/fetch_assets.py` first"
            )
    root = cache / "benchmarks" / "shard_times"
    root.mkdir(parents=True, exist_ok=True)
    small = root / "two_layers"
    if not (small / "model.safetensors").is_file():
        _command("student", "init", "--from", cache / MODEL, "--layers", "2", small)
    found = {}
    teachers = [(SMALL, small, "transformers"), (TEACHER, cache / MODEL, "vllm")]
    for name, model, engine in teachers[:1] if quick else teachers:
        recipe = _recipe(root, cache, model, engine)
        if quick:
            recipe["steps"]["documents"]["max_rows"] = QUICK_ROWS
        path = root / (f"{engine}_quick.yaml" if quick else f"{engine}.yaml")
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        _command("run", path)
        steps = json.loads(_command("status", path, "--json"))
        found[name] = _times_in(Path(steps[-1]["folder"]))
    return found


def _recipe(root: Path, cache: Path, model: Path, engine: str) -> dict[str, Any]:
    return {
        "name": f"shard_times_{engine}",
        "models": {"teacher": {"path": str(model), "dtype": "float32", "engine": engine}},
        "steps": {
            "documents": {
                "stage": "ingest",
                "source": {"kind": "jsonl", "paths": [str(_texts(root, cache))]},
                "tokenizer": "teacher",
                "length": 256,
                "mode": "truncate",
                "heldout_fraction": 0.0,
                "rows_per_shard": ROWS_PER_SHARD,
            },
            "signals": {
                "stage": "teacher_logits",
                "input": "documents",
                "model": "teacher",
                "encoding": {"kind": "threshold", "k": 16},
            },
        },
        "execution": {"root": str(root), "engine": {"max_model_len": 512, "enforce_eager": True}},
    }


def _texts(root: Path, cache: Path) -> Path:
    """Write pages and answers as one jsonl."""
    pages, answers = ((cache / name).read_text(encoding="utf-8") for name in TEXTS)
    texts = [json.loads(line)["text"] for line in pages.splitlines()]
    for row in json.loads(answers):
        texts.append(" ".join(part for part in (row["instruction"], row["output"]) if part))
    path = root / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def _times_in(folder: Path) -> ShardTimes:
    rows = []
    for shard in read_manifest(folder).shards:
        notes = read_notes(folder, shard.name)
        assert notes is not None, f"{folder / shard.name} has no record"
        rows.append((shard.num_tokens, notes["notes"]["seconds"]))
    tokens, seconds = np.asarray(rows, float).T
    return ShardTimes(tokens, seconds)


def _command(*arguments: str | Path) -> str:
    command = Path(sys.executable).with_name("teachercache")
    done = subprocess.run([str(command), *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"teachercache {arguments[0]} ended with code {done.returncode}")
    return done.stdout
