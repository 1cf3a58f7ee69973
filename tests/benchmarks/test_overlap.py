"""The overlap benchmark: its stand-ins make the same rows both ways, and its bars are judged."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.capture.overlap import BEFORE, NOW, judge, make, measure_ways, tasks_in
from benchmarks.capture.ready_positions import K, Ready, StandInEngine, handed_over
from benchmarks.storage.real_positions import ROW_TOKENS
from schemas.storage.shards import read_shard


@pytest.fixture
def ready() -> Ready:
    rng = np.random.default_rng(0)
    num = 3 * (ROW_TOKENS - 1)
    num_head_N = rng.integers(0, K + 1, num)
    in_head_NK = np.arange(K) < num_head_N[:, None]
    return Ready(
        next_logprobs_N=-rng.random(num).astype(np.float32),
        entropies_N=rng.random(num).astype(np.float32),
        token_ids_NK=rng.integers(0, 49_152, (num, K)),
        num_head_N=num_head_N,
        fractions_NK=np.where(in_head_NK, rng.random((num, K)), 0.0),
    )


def test_both_ways_write_the_same_rows(ready: Ready, tmp_path: Path) -> None:
    tasks = tasks_in(tmp_path, per_shard=5, shards=2)
    engine = StandInEngine(float("inf"), ready.num_rows)
    with handed_over(ready):
        made = {}
        for way in (BEFORE, NOW):
            make(way, tasks, engine)
            files = [tmp_path / "out" / f"{task.name}.arrow" for task in tasks]
            made[way] = [read_shard(file) for file in files]
    for before, now in zip(made[BEFORE], made[NOW], strict=True):
        assert before.equals(now)
    ids_PK = np.asarray(
        made[NOW][0]["token_ids_PK"][3].as_py()
    )  # the fourth row is the first again
    np.testing.assert_array_equal(ids_PK, ready.token_ids_NK[: ROW_TOKENS - 1])


def test_rows_and_bars_of_a_short_run(ready: Ready) -> None:
    rows = measure_ways(ready, per_shard=2, shards=1, repetitions=1, rates=(150_000,))
    assert [(row["way"], row["engine, tokens/s"]) for row in rows] == [
        (BEFORE, "no time"),
        (NOW, "no time"),
        (BEFORE, 150_000),
        (NOW, 150_000),
    ]
    speed, cpu, size = judge(rows)
    assert 0 < speed["value"] <= 1.1 and speed["target"] == ">= 0.95"
    assert cpu["value"] == pytest.approx(
        rows[0]["CPU us a token"] / rows[1]["CPU us a token"], rel=1e-3
    )
    assert size["target"] == "<= 1.013"
