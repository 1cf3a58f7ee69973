"""Runs that are killed, run twice at once, or run out of disk: the next run puts it right."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from schemas.errors import StoreError
from schemas.storage.records import read_record
from tests.fixtures.tiny_recipe import (
    COMMAND,
    Said,
    TinyRecipe,
    environment,
    finish,
    heed_interrupts,
    make_recipe,
    start,
    table_bytes,
    teachercache,
)
from tests.servers.warm_python import WarmProcess

NUM_KILLS, NUM_PARAGRAPHS = 10, 90
# One thread: the same sums in the same order, and two runs share two cores in peace.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def finished(
    tiny_model: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TinyRecipe:
    """A recipe that one undisturbed process ran from beginning to end."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = make_recipe(folder, tiny_model, paragraphs[:NUM_PARAGRAPHS])
    said = finish(start("run", recipe.path, **ENVIRONMENT))
    assert said.code == 0, said.err
    return recipe


def beside(recipe: TinyRecipe, folder: Path) -> TinyRecipe:
    """The same recipe with an empty root."""
    own = recipe.copy(folder)
    shutil.rmtree(own.root)
    return own


def all_bytes(recipe: TinyRecipe) -> dict[str, dict[str, bytes]]:
    return {step.name: table_bytes(step.folder) for step in recipe.plan()}


def finished_shards(recipe: TinyRecipe) -> dict[str, tuple[int, int]]:
    """Inode and time of every shard whose record verifies, and of the records."""
    found = {}
    for step in recipe.plan():
        for path in step.folder.glob("shard-*.json"):
            if read_record(step.folder, path.stem) is not None:
                for name in (path.name, f"{path.stem}.arrow"):
                    stat = (step.folder / name).stat()
                    found[f"{step.name}/{name}"] = (stat.st_ino, stat.st_mtime_ns)
    return found


def begun_shards(recipe: TinyRecipe) -> dict[str, int]:
    """How many shards of each step were begun and not finished: what the next run does again."""
    begun: Counter[str] = Counter()
    for step in recipe.plan():
        stems = {re.split(r"[.]", path.name)[0] for path in step.folder.glob("shard-*.arrow*")}
        begun[step.name] = sum(read_record(step.folder, stem) is None for stem in stems)
    return begun


def kill_group(process: subprocess.Popen[str]) -> bool:
    """SIGKILL a started command and all it started; False where it had ended by itself."""
    running = process.poll() is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return running


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Return when it holds, or the process has ended."""
    while process.poll() is None and not condition():
        time.sleep(0.005)


def start_and_wait_for_its_first_file(recipe: TinyRecipe) -> subprocess.Popen[str]:
    """Start a run; return when it writes anything, its imports behind it."""
    before = set(recipe.root.rglob("*"))
    process = start("run", recipe.path, **ENVIRONMENT)
    folders = ("documents", "teacher_logits")
    wait_until(
        process,
        lambda: any(
            path not in before and path.name != ".lock"
            for folder in folders
            for path in (recipe.root / folder).glob("*/*")
            if path.name != ".work" or any(path.glob("*"))
        ),
    )
    return process


@pytest.mark.slow
def test_killed_at_ten_moments_the_bytes_are_those_of_one_run(
    finished: TinyRecipe, tmp_path: Path
) -> None:
    """Each run works for a random while, about a tenth of the whole, and goes on where it stood.

    Should one come to the end before its moment, its bytes are compared and the next begins anew.
    """
    expected = all_bytes(finished)
    recipe = beside(finished, tmp_path)
    process = start_and_wait_for_its_first_file(recipe)
    began = time.monotonic()
    assert finish(process).code == 0
    seconds = time.monotonic() - began
    assert all_bytes(recipe) == expected
    shutil.rmtree(recipe.root)
    draw = random.Random(20)
    moments = [draw.uniform(0.0, 1.8) * seconds / NUM_KILLS for _ in range(NUM_KILLS)]
    kills, kept, recomputed = 0, 0, 0
    while kills < NUM_KILLS:
        before = finished_shards(recipe)
        process = start_and_wait_for_its_first_file(recipe)
        time.sleep(moments[kills])
        was_running = kill_group(process)
        after = finished_shards(recipe)
        assert {name: after.get(name) for name in before} == before  # none was written again
        begun = begun_shards(recipe)
        assert max(begun.values()) <= 1  # the one shard in hand of the one worker
        kills += was_running
        kept += len(after)
        recomputed += sum(begun.values())
        if not was_running:
            assert all_bytes(recipe) == expected
            shutil.rmtree(recipe.root)
    before = finished_shards(recipe)
    assert finish(start("run", recipe.path, **ENVIRONMENT)).code == 0
    after = finished_shards(recipe)
    assert {name: after[name] for name in before} == before
    assert all_bytes(recipe) == expected
    assert kept > 0 and recomputed <= NUM_KILLS
    leftovers = [path for path in recipe.root.rglob("*") if ".tmp-" in path.name]
    assert not leftovers and not list(recipe.root.rglob(".work"))
    assert teachercache("verify", recipe.root).code == 0


@pytest.mark.slow
def test_two_workers_killed_lose_at_most_the_shard_in_hand_of_each(
    finished: TinyRecipe, tmp_path: Path
) -> None:
    recipe = finished.copy(tmp_path)
    folder = recipe.step("signals").folder
    shutil.rmtree(folder)
    two_workers = ("run", recipe.path, "--set", "execution.workers=2")
    process = start(*two_workers, **ENVIRONMENT)
    wait_until(process, lambda: len(list(folder.glob("shard-*.json"))) >= 3)
    assert kill_group(process)
    before = finished_shards(recipe)
    assert begun_shards(recipe)["signals"] <= 2
    assert finish(start(*two_workers, **ENVIRONMENT)).code == 0
    after = finished_shards(recipe)
    assert {name: after[name] for name in before} == before
    assert all_bytes(recipe) == all_bytes(finished)
    assert not [path for path in folder.iterdir() if ".tmp-" in path.name]


@pytest.mark.slow
def test_two_runs_on_one_root_at_once(finished: TinyRecipe, tmp_path: Path) -> None:
    recipe = beside(finished, tmp_path)
    processes = [start("run", recipe.path, **ENVIRONMENT) for _ in range(2)]
    said = sorted((finish(process) for process in processes), key=lambda said: said.code)
    assert said[0].code == 0
    if said[1].code != 0:  # else it came to each step when the other had just finished it
        assert said[1].code == StoreError.exit_code
        assert re.search(r"is being written by process \d+ on .*; wait for it", said[1].error)
    assert all_bytes(recipe) == all_bytes(finished)
    assert teachercache("verify", recipe.root).code == 0


@pytest.mark.slow
def test_an_interrupted_run_says_so_and_gives_the_terminal_back(
    finished: TinyRecipe, tmp_path: Path
) -> None:
    """Ctrl-C reaches the whole group: the run and both its workers."""
    recipe = finished.copy(tmp_path)
    folder = recipe.step("signals").folder
    shutil.rmtree(folder)
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [str(COMMAND), "run", str(recipe.path), "--set", "execution.workers=2"],
        env={**os.environ, **ENVIRONMENT, "TERM": "xterm"},
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )
    os.close(theirs)
    screen = threading.Thread(target=lambda: seen.append(read_all(ours)))
    seen: list[bytes] = []
    screen.start()
    wait_until(process, lambda: any(folder.glob("shard-*.json")))
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate()
    screen.join()
    assert (process.returncode, said.strip()) == (
        130,
        "interrupted: finished shards and checkpoints are kept, run again to go on",
    )
    hidden, shown = (seen[0].count(code) for code in (b"\x1b[?25l", b"\x1b[?25h"))
    assert hidden == shown > 0


def read_all(terminal: int) -> bytes:
    """Read a terminal until its other side is closed, which Linux reports as an error."""
    parts = []
    with contextlib.suppress(OSError):
        while part := os.read(terminal, 1 << 16):
            parts.append(part)
    os.close(terminal)
    return b"".join(parts)


# A disk that refuses: with a limit on the size of files the kernel fails the write at that byte.


LIMITED = """
import resource, sys
from pipeline.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
main()
"""


def run_with_files_below(num_bytes: int, recipe: TinyRecipe) -> Said:
    words = ["teachercache", str(num_bytes), "run", str(recipe.path)]
    return finish(WarmProcess(LIMITED, words, environment(**ENVIRONMENT)))


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_next_run_finishes(
    finished: TinyRecipe, tmp_path: Path
) -> None:
    """Room runs out in the source's own work, at a shard of signals, and at their list."""
    expected = all_bytes(finished)
    shard = max(len(b) for name, b in expected["signals"].items() if name.endswith(".arrow"))
    listed = len(expected["signals"]["shards.feather"])
    recipe = beside(finished, tmp_path)
    limits = {".work": 300, ".arrow": shard - 10, "shards.feather": listed - 10}
    for what, limit in limits.items():
        said = run_with_files_below(limit, recipe)
        assert said.code == StoreError.exit_code == 1
        assert said.error.startswith("no space left writing ") and what in said.error
        assert "nothing half-written counts as done" in said.error
        assert not [path for path in recipe.root.rglob("*") if ".tmp-" in path.name]
        assert not sum(begun_shards(recipe).values())
        if what == ".work":
            recipe.only("documents").run()
        if what == ".arrow":
            recipe.run()
            for name in ("manifest.json", "shards.feather"):
                (recipe.step("signals").folder / name).unlink()
    before = finished_shards(recipe)
    assert before
    assert finish(start("run", recipe.path, **ENVIRONMENT)).code == 0
    after = finished_shards(recipe)
    assert {name: after[name] for name in before} == before
    assert all_bytes(recipe) == expected
