"""Which cached target brings a student nearest to the truth, where the truth is known?

The teacher is a source in closed form (``known_source.source``), so held-out KL is to the true
distributions and not to a model of them. Students are small Llamas from random weights; a seed has
rows, weights, order and draws of its own, and within it every target has the same rows, weights,
order and steps. Learning rates are searched on one more seed and other held-out rows, the same ones
for every family of targets. Everything is made by the product: recipes and peers' rows lie in
``CACHE/benchmarks/distributions``, a second run keeps what is finished.

Bars: what must hold by construction, the source's own KL to its cached table.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.bars import at_most, benchmark_parser, finish
from benchmarks.known_source.files import (
    write_draws,
    write_renormalised,
    write_rows,
    write_source,
    write_student,
)
from benchmarks.known_source.source import KnownSource
from benchmarks.methods.distribution_methods import (
    FAMILIES,
    OF_NAME,
    RENORMALISED,
    TEXT,
    Method,
)
from benchmarks.methods.distributions_report import table_rows, write_docs
from benchmarks.recipe_run import run_recipe_file
from pipeline.imports.import_tables import import_tables
from schemas.dataset import open_dataset
from schemas.storage.manifest import read_manifest
from stages.student.evaluate.by_row import read_rows

SOURCE = KnownSource.drawn(
    vocab_size=256,
    groups=8,
    copies=(0.15, 0.35),
    window=8,
    exponents=(0.9, 1.8),
    seed=0,
)
TRUTH = "source"
MAX_OWN_KL = 1e-3  # float16 states
SEARCH_SEED = 1000
OWN_HELDOUT = 0.02  # of a training table, which has to hold some rows out
# Rows of each purpose are drawn with seeds of their own.
HELDOUT_ROWS, SEARCH_ROWS = 2_000_000, 2_000_001


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is trained, on what, how often; a step takes ``batch_size`` rows once."""

    seeds: int
    rows: int
    heldout: int
    batch_size: int
    rates: tuple[float, ...]
    methods: tuple[str, ...]
    length: int = 64
    width: int = 64
    layers: int = 2

    @property
    def steps(self) -> int:
        """One pass over the rows but for those that each table holds out, a fiftieth of them."""
        return int((1 - 1.5 * OWN_HELDOUT) * self.rows) // self.batch_size


FULL = Settings(
    seeds=5,
    rows=2000,
    heldout=200,
    batch_size=8,
    rates=(1.25e-3, 2.5e-3, 5e-3),
    methods=tuple(OF_NAME),
)
QUICK = Settings(seeds=2, rows=320, heldout=40, batch_size=8, rates=(5e-3,), methods=FAMILIES)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--docs", type=Path, help="write evidence_distributions.md there")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL
    name = "distributions-quick" if options.quick else "distributions"
    study = Study(options.cache / "benchmarks" / name, settings)
    measured = study.carry_out()
    rows = table_rows(measured)
    bars = [at_most("KL of the source to its own cached table", measured["own_kl"], MAX_OWN_KL)]
    status = finish(bars, rows, options.json)
    if options.docs:
        write_docs(options.docs, measured, quick=options.quick)
    return status


class Study:
    """All runs in one folder: files, recipes, the product's root, ``results.json``."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self.methods = [OF_NAME[name] for name in settings.methods]
        length = settings.length
        if not (folder / TRUTH / "config.json").is_file():
            write_source(folder / TRUTH, SOURCE, length)
        for name, seed in (("heldout", HELDOUT_ROWS), ("search-heldout", SEARCH_ROWS)):
            write_rows(self._rows(name), SOURCE.sequences(settings.heldout, length, seed))

    def carry_out(self) -> dict[str, Any]:
        """Search learning rates, train every seed, and return what was measured."""
        search = self.search()
        rates = {family: min(found, key=found.__getitem__) for family, found in search.items()}
        seeds = [self.run_seed(seed, rates) for seed in range(self.settings.seeds)]
        methods = {
            method.name: {
                "label": method.label,
                "family": method.family,
                "rate": rates[method.family],
                "kl_SE": [seed["kl"][method.name] for seed in seeds],
                "bytes": float(np.mean([seed["bytes"][method.name] for seed in seeds])),
                "entries": float(np.mean([seed["entries"][method.name] for seed in seeds])),
            }
            for method in self.methods
        }
        measured = {
            "settings": asdict(self.settings) | {"steps": self.settings.steps},
            "search": {
                family: {f"{r:g}": kl for r, kl in of.items()} for family, of in search.items()
            },
            "vocab_size": SOURCE.vocab_size,
            "top_mass": self._top_mass(),
            "own_kl": float(np.mean([seed["kl"][TRUTH] for seed in seeds])),
            "entropy": seeds[0]["entropy"],
            "methods": methods,
        }
        (self.folder / "results.json").write_text(json.dumps(measured) + "\n")
        return measured

    def search(self) -> dict[str, dict[float, float]]:
        """Return held-out KL by family and learning rate, of one seed and rows of its own."""
        students = {
            f"{family}-at-{number}": (OF_NAME[family], rate)
            for family in FAMILIES
            for number, rate in enumerate(self.settings.rates)
        }
        ran = self._run("search", SEARCH_SEED, students, heldout="search-heldout")
        found: dict[str, dict[float, float]] = {family: {} for family in FAMILIES}
        for name, (method, rate) in students.items():
            found[method.name][rate] = float(np.mean(ran["kl"][name]))
        return found

    def run_seed(self, seed: int, rates: Mapping[str, float]) -> dict[str, Any]:
        """Train and measure a student of every method."""
        students = {method.name: (method, rates[method.family]) for method in self.methods}
        return self._run(f"seed-{seed}", seed, students, heldout="heldout")

    def _top_mass(self) -> dict[str, float]:
        """Return the share of the k likeliest tokens, for each k that is renormalised."""
        ids_BT = SOURCE.sequences(64, self.settings.length, HELDOUT_ROWS)
        falling_BTV = np.sort(SOURCE.probs(ids_BT), axis=2)[..., ::-1]
        sizes = [each.size for each in self.methods if each.family == RENORMALISED]
        return {f"{k}": float(falling_BTV[..., :k].sum(axis=2).mean()) for k in sizes}

    def _rows(self, name: str) -> Path:
        return self.folder / "rows" / name / "rows.parquet"

    def _run(
        self,
        name: str,
        seed: int,
        students: Mapping[str, tuple[Method, float]],
        *,
        heldout: str,
    ) -> dict[str, Any]:
        """Write a seed's files and recipe, run it, and read its report and its tables' sizes."""
        settings = self.settings
        ids_BT = SOURCE.sequences(settings.rows, settings.length, seed)
        write_rows(self._rows(name), ids_BT)
        blank = self.folder / "students" / f"{seed}"
        if not (blank / "config.json").is_file():
            vocab_size, layers = SOURCE.vocab_size, settings.layers
            write_student(
                blank, vocab_size=vocab_size, width=settings.width, layers=layers, seed=seed
            )
        steps = self._tables(name, heldout)
        distinct: dict[str, float] = {}
        for method in {method.name: method for method, _ in students.values()}.values():
            if method.made == "peer":
                folder, distinct[method.name] = self._imported(name, method, ids_BT, seed)
                steps[f"of-{method.name}"] = {"stage": "finished_table", "folder": str(folder)}
            elif method.made == "product":
                scored = {"stage": "teacher_logits", "input": "rows", "model": TRUTH, "seed": seed}
                steps[f"of-{method.name}"] = scored | {"encoding": method.encoding}
        steps |= {student: self._train(*of, seed=seed) for student, of in students.items()}
        steps["report"] = {
            "stage": "evaluate",
            "students": [TRUTH, *students],
            "data": ["heldout", "truth"],
        }
        folders = self._carried_out(name, blank, steps)
        return self._measured(folders, distinct)

    def _tables(self, name: str, heldout: str) -> dict[str, Any]:
        files = {"stage": "token_files", "tokenizer": TRUTH, "length": self.settings.length}
        rows, held_out = (
            {"kind": "parquet", "paths": [str(self._rows(each))]} for each in (name, heldout)
        )
        return {
            "rows": files | {"source": rows, "heldout_fraction": OWN_HELDOUT},
            "heldout": files | {"source": held_out, "heldout_fraction": 0.999},
            "truth": {
                "stage": "teacher_logits",
                "input": "heldout",
                "model": TRUTH,
                "encoding": {"kind": "exact"},
            },
        }

    def _train(self, method: Method, rate: float, *, seed: int) -> dict[str, Any]:
        objective = {"loss": "cross_entropy"} if method.name == TEXT else {"loss": "kd"}
        signals = [] if method.name == TEXT else [f"of-{method.name}"]
        return {
            "stage": "train",
            "student": "blank",
            "data": ["rows", *signals],
            "objective": objective,
            "lr": rate,
            "max_steps": self.settings.steps,
            "per_device_batch_size": self.settings.batch_size,
            "seed": seed,
        }

    def _imported(self, name: str, method: Method, ids_BT: Any, seed: int) -> tuple[Path, float]:
        """Write a peer's rows and import them; returns the signals and entries a position."""
        folder = self.folder / "peers" / name / method.name
        entries = float(method.size)
        if method.name.startswith("draws"):
            peer = "distillkit"
            file = folder / "rows.parquet"
            entries = write_draws(file, ids_BT, SOURCE, method.size, seed)
        else:
            peer = "axolotl"
            write_renormalised(folder / "rows.parquet", ids_BT, SOURCE, method.size)
        made = import_tables(
            folder,
            self.folder / "cache",
            peer=peer,
            tokenizer=self.folder / TRUTH,
            teacher="the source itself",
            heldout_fraction=OWN_HELDOUT,
        )
        return made.signals, entries

    def _carried_out(self, name: str, blank: Path, steps: Mapping[str, Any]) -> dict[str, Path]:
        engine = {"engine": "transformers", "dtype": "float32"}
        recipe = {
            "name": name,
            "models": {
                TRUTH: {"path": str(self.folder / TRUTH), "trust_remote_code": True} | engine,
                "blank": {"path": str(blank)} | engine,
            },
            "steps": dict(steps),
            "execution": {"root": str(self.folder / "cache"), "engine": {"device": "cpu"}},
        }
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe, sort_keys=False))
        started = time.monotonic()
        made = run_recipe_file(file)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        return {step: planned.folder for step, planned in made.items()}

    def _measured(
        self, folders: Mapping[str, Path], distinct: Mapping[str, float]
    ) -> dict[str, Any]:
        table = read_rows(folders["report"])
        students, kls = (table.column(name).to_numpy() for name in ("student", "kl_to_teacher"))
        sizes: dict[str, float] = {}
        entries: dict[str, float] = {}
        for method in self.methods:
            sizes[method.name], entries[method.name] = _size(method, folders, distinct)
        truth = open_dataset([folders["heldout"], folders["truth"]], split="heldout", verify=False)
        entropies = [truth[index]["entropies_P"].astype(np.float64) for index in range(len(truth))]
        return {
            "kl": {str(name): kls[students == name].tolist() for name in dict.fromkeys(students)},
            "bytes": sizes,
            "entries": entries,
            "entropy": float(np.concatenate(entropies).mean()),
        }


def _size(
    method: Method, folders: Mapping[str, Path], distinct: Mapping[str, float]
) -> tuple[float, float]:
    """Return bytes and entries a position: measured, but RS-KD's published 3 bytes an entry."""
    if f"of-{method.name}" not in folders:
        return 0.0, 0.0
    if method.name.startswith("draws"):
        return 3.0 * distinct[method.name], distinct[method.name]
    folder = folders[f"of-{method.name}"]
    manifest = read_manifest(folder)
    per_position = sum(shard.num_bytes for shard in manifest.shards) / manifest.num_positions
    if method.size:
        return per_position, float(method.size)
    rows = open_dataset([folder], split="train", verify=False)
    if "num_head_P" not in (first := rows[0]):
        return per_position, float(first["hidden_PD"].shape[1])
    kept = [
        rows[index]["num_head_P"].astype(np.int64) + rows[index]["num_tail_P"]
        for index in range(min(len(rows), 200))
    ]
    return per_position, float(np.concatenate(kept).mean())


if __name__ == "__main__":
    sys.exit(main())
