"""What does scoring candidates cost, against scoring each as a sequence of its own?

Real 5-shot episodes of news classification with 4 candidates, once with its own labels (one token
each) and once with labels spelled out (two to four tokens). Both engines; a
repetition runs both ways in turns, and what is compared is the ratio within a repetition, of
processor time: both engines run in this process, and other work on the machine adds nothing to it.

*apart* gives the engine prompt + candidate for every candidate and reads all hidden states, as
scoring through ``teacher_logits`` or any log-prob API would; the head runs on the candidates'
tokens alone in both.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.bars import Bar, at_least, at_most, benchmark_parser, finish, markdown_table
from schemas.tables.candidate_scores import CandidateScores
from schemas.tables.episodes import Episode
from stages.models.engines.engine import Engine, EngineKind, open_engine
from stages.models.spec import EngineOptions
from stages.signals.candidate_scores.work import Branches, score_candidates
from stages.signals.scoring.logits import logprobs_of
from stages.sources.episodes.stage import EpisodesStage

FULL, QUICK = (8, 1), (1, 1)  # episodes, repetitions
MIN_GAIN, MAX_DIFFERENCE = 3.5, 1e-3
ENGINES: tuple[EngineKind, ...] = ("vllm", "transformers")
SPELLED_OUT = {
    "world": "international affairs",
    "sports": "sports and games",
    "business": "business and finance",
    "technology": "science and technology",
}

PAGE = """# Candidates: prompts run once

Regenerate with `python benchmarks/capture/candidates.py --docs docs/measured/` (the figures below
come from that run). SmolLM2-135M-Instruct in float32 on CPU threads, {episodes} episodes of 5
demonstrations and 4 candidates, {repetitions} repetitions of both ways in turns. "gain" is how many
times the processor time of the stage the same engine takes, given every candidate as a sequence of
its own; "tokens" is how many tokens the engine is asked to run that no earlier sequence of the
shard begins with, "apart" how many otherwise.

{bars}

{rows}

With labels of one token all four candidates are read off one state. With longer ones the
transformers engine runs the prompt once and the candidates on its keys and values; vLLM skips whole
blocks of its prefix cache (32 tokens here, which its attention on a CPU does not go below; 16 on a
GPU), so the end of the prompt is run again for each candidate. Where a skipped block holds the
prompt's last state, that of the sequence which filled it is taken.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--docs", type=Path, help="write candidates.md to this folder")
    options = parser.parse_args(arguments)
    num_episodes, repetitions = QUICK if options.quick else FULL
    tasks = options.cache / "tasks" / "crossfit" / "agnews"
    model = options.cache / "models" / "smollm2-135m-instruct"
    for needed in (tasks, model):
        if not needed.is_dir():
            print(f"{needed} is missing: run `python examples/fetch_tasks.py` first")
            return 2
    with tempfile.TemporaryDirectory(prefix="candidates-") as work:
        sets = episode_sets(tasks, model, Path(work), num_episodes)
    rows = [row for kind in ENGINES for row in measure(kind, model, sets, repetitions=repetitions)]
    bars = judge(rows)
    if options.docs is not None:
        shown = [{"bar": b["name"], "value": b["value"], "target": b["target"]} for b in bars]
        page = PAGE.format(
            episodes=num_episodes,
            repetitions=repetitions,
            bars=markdown_table(shown),
            rows=markdown_table(rows),
        )
        (options.docs / "candidates.md").write_text(page)
    return finish(bars, rows, options.json)


def episode_sets(
    tasks: Path, model: Path, work: Path, num_episodes: int
) -> dict[str, list[Episode]]:
    """Return the same kind of episodes with the task's own labels and with longer ones."""
    (file,) = tasks.glob("*.tsv")
    lines = [line.split("\t") for line in file.read_text().splitlines()]
    longer = "".join(f"{text}\t{SPELLED_OUT[label]}\n" for text, label in lines)
    (work / file.name).write_text(longer)
    return {
        "own labels": _episodes(file, model, work / "own", num_episodes),
        "spelled out": _episodes(work / file.name, model, work / "longer", num_episodes),
    }


def _episodes(file: Path, model: Path, work: Path, num_episodes: int) -> list[Episode]:
    stage = EpisodesStage.model_validate(
        {
            "stage": "episodes",
            "tokenizer": str(model),
            "sources": [{"kind": "crossfit", "paths": [str(file)], "task_kind": "classification"}],
            "targets": ["agnews"],
            "paradigm": "meta",
            "demonstrations": 5,
            "draw": "resample",
            "queries_per_task": num_episodes,
            "max_length": 1024,
        }
    )
    prepared = stage.prepare(work)
    return [row for index in range(len(prepared.shards)) for row in stage.read(work, index)]


def measure(
    kind: EngineKind, model: Path, sets: dict[str, list[Episode]], *, repetitions: int
) -> list[dict[str, Any]]:
    """Run both ways in turns on one engine."""
    rows = []
    options = EngineOptions(max_model_len=1024)
    opened = open_engine(kind, model, dtype="float32", options=options, share_prefixes=True)
    with opened as engine:
        for labels, episodes in sets.items():
            requests = [Branches.of(episode) for episode in episodes]
            score_all(engine, requests[:2])  # warm up
            ours_s, apart_s, difference = [], [], 0.0
            for _ in range(repetitions):
                ours, seconds = timed(lambda: score_all(engine, requests))  # noqa: B023
                apart, apart_seconds = timed(lambda: score_apart(engine, episodes))  # noqa: B023
                ours_s.append(seconds)
                apart_s.append(apart_seconds)
                difference = max(difference, float(np.abs(ours - apart).max()))
            rows.append(
                {
                    "engine": kind,
                    "labels": labels,
                    "gain": median(b / a for a, b in zip(ours_s, apart_s, strict=True)),
                    "stage, CPU s": median(ours_s),
                    "apart, CPU s": median(apart_s),
                    "tokens": new_tokens(requests),
                    "tokens apart": sum(
                        len(r.sequences[0]) - r.counts[0] + 1 + len(c)
                        for r in requests
                        for c in r.candidates
                    ),
                    "largest difference, nats": difference,
                }
            )
    return rows


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    clock = time.process_time()
    result = work()
    return result, time.process_time() - clock


def score_all(engine: Engine, requests: Sequence[Branches]) -> Any:
    """Score as the stage does; all candidates of all episodes, end to end."""
    rows = list(score_candidates(engine, requests))
    assert all(isinstance(row, CandidateScores) for row in rows)
    return np.concatenate([row.candidate_logprobs_N for row in rows])  # type: ignore[union-attr]


def score_apart(engine: Engine, episodes: Sequence[Episode]) -> Any:
    """Score every candidate as a sequence of its own."""
    sequences, candidates = [], []
    for episode in episodes:
        prompt_T = episode.input_ids_T[: episode.answer_start]
        for candidate in np.split(
            episode.candidate_ids_C, np.cumsum(episode.candidate_lengths_N)[:-1]
        ):
            sequences.append(np.concatenate([prompt_T, candidate]))
            candidates.append(candidate)
    scores = []
    states = engine.hidden_states(sequences)
    for hidden_TD, candidate in zip(states, candidates, strict=True):
        rows = np.arange(len(candidate))
        hidden_RD: torch.Tensor = hidden_TD[-len(candidate) - 1 : -1]
        scores.append(logprobs_of(engine.head, hidden_RD, rows, candidate).sum())
    return np.array(scores)


def new_tokens(requests: Sequence[Branches]) -> int:
    """Count prefixes that are not the beginning of a sequence counted already."""
    seen = {
        sequence[: n + 1].tobytes()
        for request in requests
        for sequence in request.sequences
        for n in range(len(sequence))
    }
    return len(seen)


def judge(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    bars = [
        at_least(f"{row['engine']}, {row['labels']}: times as fast", row["gain"], MIN_GAIN)
        for row in rows
    ]
    worst = max(row["largest difference, nats"] for row in rows)
    return [*bars, at_most("largest difference of a score, nats", worst, MAX_DIFFERENCE)]


if __name__ == "__main__":
    sys.exit(main())
