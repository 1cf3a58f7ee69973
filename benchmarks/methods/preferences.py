"""Do DCKD and ADPA bring a teacher's preferences to a student, where the true reward is known?

Responses of a grammar (``rewarded_grammar.grammar``) are ordered in pairs by a programmed reward
that partly conflicts with their likelihood. A teacher learns the grammar's texts, then the chosen
responses, then the pairs by ``teacher_align``. Students of a quarter of its parameters learn texts
and chosen responses (SFT), and every method goes on from there for the same steps. Judged are
sampled responses to new prompts: by the true reward against those of the same seed's SFT (a tie is
half a win), by the teacher's implicit reward, and by KL to SFT.

Learning rate and strength of each method are searched alike (``preference_search``), on other seeds
and other prompts.
Everything is made by the product: recipes lie in ``CACHE/benchmarks/preferences``, a second run
keeps what is finished. Dimensions: S = seeds, E = prompts, N = responses to each.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from benchmarks.bars import at_least, at_most, benchmark_parser, finish
from benchmarks.methods.advantage_peaks import peaks, unlikely_share
from benchmarks.methods.preference_measures import rewards_of, rows_of, scores_of, training_of, wins
from benchmarks.methods.preference_search import Search
from benchmarks.methods.preference_steps import (
    ADPA,
    ALIGNED,
    REFERENCE,
    START,
    Run,
    Size,
    recipe_of,
)
from benchmarks.methods.preferences_report import half_width, table_rows, write_docs
from benchmarks.recipe_run import run_recipe_file, two_processes
from benchmarks.rewarded_grammar.files import END, num_parameters, write_jsonl, write_model
from benchmarks.rewarded_grammar.grammar import Grammar, preferred, prompts, reward
from stages.models.checkpoints.checkpoint import read_checkpoint
from stages.models.checkpoints.tokenizer import open_tokenizer

Array = npt.NDArray[Any]
GRAMMAR = Grammar()
LEAST_GAP = 2.0  # between the rewards of a pair
PEAK_ROWS = (
    200  # prompts whose first response is asked for tokens that the reference would not write
)
MIN_ACCURACY, MAX_HALF_WIDTH = 0.9, 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is trained, and what is searched; ``factors`` multiply a method's strength."""

    seeds: int
    size: Size
    rates: tuple[float, ...]
    factors: tuple[float, ...]
    teacher: tuple[int, int] = (96, 3)  # width, layers
    student: tuple[int, int] = (48, 3)


FULL = Settings(
    seeds=17,
    size=Size(
        texts=40_000,
        pairs=6_000,
        trials=500,
        questions=1_000,
        teacher_steps=1_000,
        align_steps=400,
        base_steps=1_500,
        sft_steps=150,
        steps=170,
    ),
    rates=(1e-3, 3e-3, 3e-4),
    factors=(0.1, 1 / 3, 3.0, 0.03, 0.01),
)
QUICK = Settings(
    seeds=2,
    size=Size(
        texts=500,
        pairs=120,
        trials=20,
        questions=40,
        teacher_steps=30,
        align_steps=20,
        base_steps=20,
        sft_steps=4,
        steps=4,
        batch_size=16,
    ),
    rates=(1e-3,),
    factors=(),
    teacher=(32, 2),
    student=(32, 2),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--docs", type=Path, help="write evidence_preferences.md there")
    options = parser.parse_args(arguments)
    name = "preferences-quick" if options.quick else "preferences"
    study = Study(options.cache / "benchmarks" / name, QUICK if options.quick else FULL)
    measured = study.carry_out()
    rows = table_rows(measured)
    bars = []
    if not options.quick:
        accuracy = measured["teacher"]["accuracy"]
        bars = [
            at_least("held-out pairs that the aligned teacher orders", accuracy, MIN_ACCURACY),
            at_most("widest half interval of a win rate", half_width(measured), MAX_HALF_WIDTH),
        ]
    status = finish(bars, rows, options.json)
    if options.docs:
        write_docs(options.docs, measured, quick=options.quick)
    return status


class Study:
    """All runs in one folder: files, recipes, the product's root, ``results.json``."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        if not (folder / "questions.jsonl").is_file():
            self._write_files()
        width, layers = settings.teacher
        self._write_model("teacher", width, layers, seed=0)

    def carry_out(self) -> dict[str, Any]:
        """Search, train and judge every seed, and return what was measured."""
        with two_processes() as pool:
            return self._carry_out(pool)

    def _carry_out(self, pool: Executor) -> dict[str, Any]:
        search = Search(self.settings.rates, self.settings.factors, self._trial, pool)
        searched = search.carry_out()
        best = {method.name: search.best(method) for method in searched}
        runs = {name: Run(name, run.method, run.rate, run.factor) for name, run in best.items()}
        seeds = list(pool.map(self.run_seed, range(self.settings.seeds), repeat(runs)))
        measured = {
            "settings": asdict(self.settings),
            "search": [
                {"method": method.name, "rate": run.rate, "factor": run.factor} | found
                for method, tried in searched.items()
                for run, found in tried.items()
            ],
            "chosen": {
                name: {"rate": run.rate} | run.method.settings(run.factor)
                for name, run in runs.items()
            },
            "teacher": seeds[0]["teacher"],
            "peaks": seeds[0]["peaks"],
            "weights": self._weights(),
            "parameters": {
                "teacher": num_parameters(self.folder / "teacher"),
                "student": num_parameters(self.folder / "students/0"),
            },
            "grammar_reward": self._grammar_reward(),
            "least_gap": LEAST_GAP,
            "students": {
                name: {what: [seed["students"][name][what] for seed in seeds] for what in _MEASURES}
                for name in (START, *runs)
            },
        }
        (self.folder / "results.json").write_text(json.dumps(measured) + "\n")
        return measured

    def _weights(self) -> list[float]:
        """Return the weights at which ADPA was searched."""
        return sorted(ADPA.centre * factor for factor in (1.0, *self.settings.factors))

    def _trial(self, name: str, seed: int, runs: Mapping[str, Run]) -> dict[str, Any]:
        """Measure runs of the search by step."""
        students: dict[str, Any] = self._run(name, seed, runs, asked="trials")["students"]
        return students

    def run_seed(self, seed: int, runs: Mapping[str, Run]) -> dict[str, Any]:
        """Train a student by every method and judge its responses."""
        return self._run(f"seed-{seed}", seed, runs, asked="questions")

    def _run(self, name: str, seed: int, runs: Mapping[str, Run], asked: str) -> dict[str, Any]:
        """Write a recipe, run it, and read its tables."""
        started = time.monotonic()
        self._write_model(f"students/{seed}", *self.settings.student, seed=seed)
        judged = asked == "questions"
        body = recipe_of(
            name, self.folder, self.settings.size, seed, runs, asked=asked, judged=judged
        )
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(body, sort_keys=False))
        folders = {name: step.folder for name, step in run_recipe_file(file).items()}
        tokenizer = open_tokenizer(self.folder / "teacher")
        num_responses = self.settings.size.responses
        rewards = {
            student: rewards_of(
                tokenizer, folders[asked], folders[f"{student}-answers"], num_responses
            )
            for student in (START, *runs)
        }
        students = {
            student: {
                "reward": rewards_EN.mean(axis=1).tolist(),
                "wins": wins(rewards_EN, rewards[START]).tolist(),
                "unlikely": unlikely_share(
                    folders[REFERENCE], rows_of(folders[f"{student}-answers"])[:PEAK_ROWS]
                ),
                "training": training_of(folders[student]),
            }
            | (scores_of(folders, f"{student}-answers") if judged else {})
            for student, rewards_EN in rewards.items()
        }
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        record = read_checkpoint(folders[ALIGNED])
        assert record is not None
        found = {"students": students, "teacher": dict(record.metrics["heldout"])}
        if judged:
            written = rows_of(folders[f"{START}-answers"])[:PEAK_ROWS]
            measured = peaks(folders[ALIGNED], folders[REFERENCE], written, self._weights())
            found["peaks"] = asdict(measured)
        return found

    def _write_model(self, name: str, width: int, layers: int, *, seed: int) -> None:
        if not (self.folder / name / "tokenizer.json").is_file():
            write_model(self.folder / name, width=width, layers=layers, seed=seed)

    def _write_files(self) -> None:
        """Write texts and pairs; no prompt of one file is in another."""
        size = self.settings.size
        counts = {"pairs": size.pairs, "trials": size.trials, "questions": size.questions}
        asked = iter(prompts(seed=1))
        rng = np.random.default_rng(2)
        for name, count in counts.items():
            rows = []
            for prompt in (next(asked) for _ in range(count)):
                chosen, rejected = preferred(prompt, GRAMMAR, rng, least_gap=LEAST_GAP)
                rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
            write_jsonl(self.folder / f"{name}.jsonl", rows)

        others = list(asked)
        drawn = (others[place] for place in rng.integers(len(others), size=size.texts))
        write_jsonl(
            self.folder / "texts.jsonl",
            [{"text": prompt + GRAMMAR.response(prompt, rng) + END} for prompt in drawn],
        )

    def _grammar_reward(self) -> float:
        rng = np.random.default_rng(3)
        asked = prompts(seed=3)[:4_000]
        return float(np.mean([reward(prompt, GRAMMAR.response(prompt, rng)) for prompt in asked]))


_MEASURES = ("reward", "wins", "unlikely", "implicit", "kl", "tokens", "answered")


if __name__ == "__main__":
    sys.exit(main())
