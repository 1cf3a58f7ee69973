"""A million shards: what looking at them costs, and that it gives the right numbers."""

import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from schemas.manifest import read_manifest
from tests.many_shards import ROWS, TOKENS, make_many_shards
from tests.tiny_recipe import COMMAND, TinyRecipe

NUM_SHARDS = 1_000_000
SECONDS, BYTES = 30.0, 2**30

MEASURE = """
import resource, subprocess, sys, time
started = time.monotonic()
subprocess.run(sys.argv[1:], check=True)
peak_kb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(time.monotonic() - started, peak_kb * 1024, file=sys.stderr)
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
    started = time.monotonic()
    total = sum(shard.num_tokens for shard in manifest.shards)
    assert time.monotonic() - started < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000
    assert total == manifest.num_tokens == NUM_SHARDS * TOKENS
    assert manifest.shards[123_456].file == "shard-0123456-of-1000000.arrow"
    assert manifest.rejects == {"too_long": NUM_SHARDS // 10}
