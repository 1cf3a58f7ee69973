"""A million shards and a thousand workers: what they cost, and that the numbers are right."""

import itertools
import json
import resource
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.scaling.scale_costs import step_tasks
from benchmarks.scaling.simulated_crew import (
    SimulatedCrew,
    Store,
    VirtualClock,
    World,
    unheard,
)
from benchmarks.scaling.synthetic_shards import ROWS, TOKENS
from pipeline.executors.dispatch import Limits, dispatch
from schemas.storage.manifest import read_manifest
from tests.fixtures.many_shards import make_many_shards
from tests.fixtures.tiny_recipe import COMMAND, TinyRecipe

NUM_SHARDS = 1_000_000
SECONDS, BYTES = 30.0, 2**30  # of the processor: others may have it at the same time

MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def million(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyRecipe]:
    """A million names in one folder: they are not left for a later session to delete."""
    folder = tmp_path_factory.mktemp("million")
    yield make_many_shards(folder, tiny_model, NUM_SHARDS)
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["plan", "status"])
def test_a_million_shards_are_looked_at_within_the_bars(million: TinyRecipe, command: str) -> None:
    words = [str(COMMAND), command, str(million.path), "--json"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, check=True
    )
    seconds, peak = map(float, done.stderr.split())
    assert seconds < SECONDS and peak < BYTES, f"{seconds:.1f} s, {peak / 2**20:.0f} MiB"
    documents, signals = json.loads(done.stdout)
    assert (documents["state"], documents["num_shards"]) == ("done", NUM_SHARDS)
    assert documents["num_rows"] == NUM_SHARDS * ROWS
    assert (signals["state"], signals["shards_done"]) == ("partial", NUM_SHARDS // 2)
    assert signals["num_positions"] == NUM_SHARDS * (TOKENS - ROWS)


@pytest.mark.slow
def test_a_million_shards_are_walked_through_without_a_million_records(million: TinyRecipe) -> None:
    manifest = read_manifest(million.step("documents").folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    total = sum(shard.num_tokens for shard in manifest.shards)
    assert time.process_time() - started < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000
    assert total == manifest.num_tokens == NUM_SHARDS * TOKENS
    assert manifest.shards[123_456].file == "shard-0123456-of-1000000.arrow"
    assert manifest.rejects == {"too_long": NUM_SHARDS // 10}


def dispatched(workers: int, num_shards: int) -> tuple[float, SimulatedCrew]:
    """Return the processor seconds of handing out shards to a simulated crew, and the crew."""
    world = World(shard_s=60.0, relative_S=np.linspace(0.5, 1.5, 50), mean_life_s=50_000.0)
    clock = VirtualClock()
    crew = SimulatedCrew(world, clock)
    limits = Limits(workers, max_attempts=3, shard_timeout_s=3600.0)
    records = dispatch(
        crew, step_tasks(num_shards), limits, warned=unheard, clock=clock, files=crew
    )
    started = time.process_time()
    names = {record.name for record in records}
    assert len(names) == num_shards
    return time.process_time() - started, crew


def test_a_shard_costs_the_dispatcher_the_same_with_a_thousand_workers() -> None:
    """Simulated workers take shards of a minute, and some die: what is looked at is real code."""
    few = [dispatched(10, 6000)[0] for _ in range(3)]
    many = [dispatched(1000, 6000) for _ in range(3)]
    assert min(seconds for seconds, _ in many) < 3 * min(few)
    assert many[0][1].spent.num_lost > 0


def test_simulated_seconds_add_up() -> None:
    """Eight workers, shards of a minute, no trouble: what it comes to can be said beforehand."""
    clock = VirtualClock()
    world = World(shard_s=60.0, relative_S=np.ones(1), slow_fraction=0.0, mean_life_s=1e15)
    crew = SimulatedCrew(world, clock)
    records = dispatch(
        crew, step_tasks(80), Limits(8, 3, None), warned=unheard, clock=clock, files=crew
    )
    assert len(list(records)) == 80
    assert clock.now == pytest.approx(world.load_s + 10 * 60.0)
    assert crew.spent.seconds["the teacher"] == pytest.approx(80 * 60.0)
    assert sum(crew.spent.seconds.values()) == pytest.approx(8 * clock.now)


def test_requests_wait_for_the_rate_of_their_prefix() -> None:
    """A hundred workers write at once, and ten writes a second go through."""
    clock = VirtualClock()
    store = Store(gets=1, puts=1, latency_s=0.5, puts_a_second=10.0, gets_a_second=1e9)
    world = World(
        shard_s=1e-9, relative_S=np.ones(1), mean_life_s=1e15, shard_bytes=2e8, store=store
    )
    crew = SimulatedCrew(world, clock)
    records = dispatch(
        crew, step_tasks(100), Limits(100, 3, None), warned=unheard, clock=clock, files=crew
    )
    assert len(list(records)) == 100 and crew.spent.num_requests == 200
    assert clock.now == pytest.approx(world.load_s + 99 / 10.0 + 2 * 0.5 + 2.0, rel=1e-3)


def test_a_few_of_a_thousand_workers_may_die_before_they_are_ready() -> None:
    """Five of a thousand do here, and none is ready before them: the run goes on without a word."""
    clock = VirtualClock()
    crew = SimulatedCrew(
        World(shard_s=60.0, relative_S=np.ones(1), mean_life_s=60_000.0, seed=1), clock
    )
    limits = Limits(1000, max_attempts=3, shard_timeout_s=None)
    records = dispatch(crew, step_tasks(1000), limits, warned=unheard, clock=clock, files=crew)
    next(records)
    assert 3 <= crew.num_lost_at_start < 1000


def test_the_dispatcher_holds_jobs_in_hand_and_no_others() -> None:
    tasks = step_tasks(100_000)
    clock = VirtualClock()
    crew = SimulatedCrew(World(shard_s=60.0, relative_S=np.ones(1)), clock)
    records = dispatch(crew, tasks, Limits(100, 3, None), warned=unheard, clock=clock, files=crew)
    next(records)
    tracemalloc.start()
    for _ in itertools.islice(records, 2000):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 2**20  # 100,000 tasks take 40 MiB
