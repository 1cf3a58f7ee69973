"""How far is `plan --estimate` off? Three recipes on a real model, estimated and then run.

Each is a part of an example with settings of its own, on SmolLM2-135M with the engine that the
example names. Both are commands in processes of their own, one after the other: the time of a run
is that of the whole command, its imports and the starts of engines with it.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks.bars import (
    Bar,
    at_least,
    at_most,
    bars_table,
    benchmark_parser,
    finish,
    markdown_table,
)
from schemas.storage.manifest import read_manifest

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMAND = Path(sys.executable).with_name("teachercache")
MAX_ERROR, MAX_RATIO = 0.25, 2.0
# Steps that are left as the example has them, and steps of our own.
PARTS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "documents": ("quickstart", ("documents", "signals", "student", "distilled"), {}),
    "pairs": (
        "adpa",
        ("pairs",),
        {
            "logprobs": {"stage": "response_logprobs", "input": "pairs", "model": "teacher"},
            "responses": {
                "stage": "responses",
                "input": "pairs",
                "model": "teacher",
                "max_tokens": 32,
                "max_rejected_fraction": 0.25,
            },
        },
    ),
    "episodes": (
        "icl_multitask",
        ("episodes", "signals", "candidates"),
        {"preferences": {"stage": "subset_preferences", "input": "episodes", "model": "teacher"}},
    ),
}
QUICK = {
    "documents": {"documents": {"max_rows": 40}, "distilled": {"max_steps": 12}},
    "pairs": {"pairs": {"max_rows": 24}},
    "episodes": {"episodes": {"queries_per_task": 2}},
}

PAGE = """# Estimates: what `plan --estimate` says, beside what the run came to

Written by `python benchmarks/estimate/estimate.py --docs docs/measured/`. Parts of three examples
on SmolLM2-135M (float32, vLLM), each estimated and then run, in processes of their own. 2 CPU
cores. "seconds" of a run are those of the whole command; those of an
estimate are the sum over its steps, without the imports.

{bars}

{recipes}

Bytes of each table:

{tables}
"""


def main() -> int:
    """Estimate and run each recipe; print figures and bars."""
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--docs", type=Path, help="write estimate.md into this folder")
    parser.add_argument("--only", choices=list(PARTS), help="one recipe")
    args = parser.parse_args()
    recipes, tables, bars = [], [], []
    for name in PARTS:
        if args.only in (None, name):
            recipe, found = measured(name, quick=args.quick)
            recipes.append(recipe)
            tables += found
            bars += bars_of(recipe, found)
    if args.docs is not None:
        page = PAGE.format(
            bars=bars_table(bars), recipes=markdown_table(recipes), tables=markdown_table(tables)
        )
        (args.docs / "estimate.md").write_text(page)
    return finish(bars, [*recipes, *tables], args.json)


def measured(name: str, *, quick: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a row for the recipe, and one for each of its tables."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(name, Path(folder), quick=quick)
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        clock = time.monotonic()
        said = teachercache("plan", path, "--estimate", "--json")
        probe_s = time.monotonic() - clock
        estimate = json.loads(said.splitlines()[-1])
        clock = time.monotonic()
        teachercache("run", path)
        run_s = time.monotonic() - clock
        plan = {step["name"]: step for step in json.loads(teachercache("plan", path, "--json"))}
        tables = []
        for step in estimate["steps"]:
            if plan[step["name"]]["num_shards"] is None:
                continue
            real = read_manifest(Path(plan[step["name"]]["folder"]))
            tables.append(
                {
                    "recipe": name,
                    "step": step["name"],
                    "rows": real.num_rows,
                    "estimated rows": step["num_rows"],
                    "bytes": real.num_bytes,
                    "estimated bytes": step["num_bytes"],
                    "bytes off": step["num_bytes"] / real.num_bytes - 1,
                    "estimated seconds": step["seconds"],
                }
            )
    row = {
        "recipe": name,
        "probe seconds": probe_s,
        "estimated seconds": estimate["seconds"],
        "run seconds": run_s,
        "ratio": estimate["seconds"] / run_s,
    }
    return row, tables


def recipe_of(name: str, folder: Path, *, quick: bool) -> Mapping[str, Any]:
    """Return the part of an example, with a root below ``folder``."""
    example, kept, own = PARTS[name]
    body: dict[str, Any] = yaml.safe_load((EXAMPLES / f"{example}.yaml").read_text())
    steps = {step: body["steps"][step] for step in kept} | own
    for step, settings in QUICK[name].items() if quick else ():
        steps[step] |= settings
    models = {"teacher": body["models"]["teacher"]}
    execution = body["execution"] | {"root": str(folder / "root")}
    return {"name": name, "models": models, "steps": steps, "execution": execution}


def bars_of(recipe: Mapping[str, Any], tables: list[dict[str, Any]]) -> list[Bar]:
    """Bytes of each recipe's worst table, and its time, by how often one is the other."""
    name = recipe["recipe"]
    worst = max(abs(table["bytes off"]) for table in tables)
    return [
        at_most(f"{name}: bytes of a table, off by at most", worst, MAX_ERROR),
        at_most(f"{name}: estimated over real seconds", recipe["ratio"], MAX_RATIO),
        at_least(f"{name}: estimated over real seconds", recipe["ratio"], 1 / MAX_RATIO),
    ]


def teachercache(*words: str | Path) -> str:
    """Run the command; return what it printed."""
    done = subprocess.run([COMMAND, *words], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
