"""The lock of a step on file systems without locks: a lease in a file, and one true line."""

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from pipeline.state import lease_file, lease_lock
from pipeline.state.saved_checkpoints import SavedCheckpoints
from pipeline.state.step_lock import LEASE_FILE, shards_lock, step_lock
from schemas.errors import ConfigError, StoreError
from schemas.storage import shard_cache
from schemas.storage.file_locks import NO_LOCKS
from schemas.storage.object_path import ObjectInfo, ObjectPath
from tests.fixtures.tiny_recipe import make_recipe, table_bytes

pytestmark = pytest.mark.usefixtures("own_cache")

OURS = f"process {os.getpid()} on {os.uname().nodename}"


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make calls for locks fail with an errno, as a file system without them does.

    ``below`` names the folder where they do; elsewhere they work.
    """

    def refuse(code: int, *calls: str, below: Path | None = None) -> None:
        def failing(call: str) -> Callable[..., None]:
            plain = getattr(fcntl, call)

            def fail(file: int | IO[str], *rest: int) -> None:
                handle = file if isinstance(file, int) else file.fileno()
                path = Path(f"/proc/self/fd/{handle}").readlink()
                if below is not None and not path.is_relative_to(below):
                    plain(file, *rest)
                    return
                raise OSError(code, os.strerror(code))

            return fail

        for call in calls or ("flock", "lockf"):
            monkeypatch.setattr(fcntl, call, failing(call))

    return refuse


@pytest.fixture(autouse=True)
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_lock, "RENEW_S", 0.2)
    monkeypatch.setattr(lease_lock, "LEASE_S", 1.5)
    monkeypatch.setattr(lease_file, "SETTLE_S", 0.1)


@pytest.mark.parametrize("code", NO_LOCKS, ids=errno.errorcode.get)
def test_without_locks_a_step_is_held_by_a_lease(
    code: int, tmp_path: Path, refuse: Callable[..., None]
) -> None:
    refuse(code)
    told: list[str] = []
    with step_lock(tmp_path, warned=told.append):
        assert told == [
            f"the file system of {tmp_path} has no file locks ({os.strerror(code)}): this run "
            f"holds the step by a file there that it goes on renewing"
        ]
        for second in (step_lock(tmp_path), shards_lock(tmp_path, range(2))):
            with pytest.raises(StoreError, match="is being written by") as caught, second:
                pass
            assert "\n" not in str(caught.value)
        with pytest.raises(StoreError, match=f"is being written by {OURS}; wait"):
            step_lock(tmp_path).__enter__()
    assert not list(tmp_path.glob(f"{LEASE_FILE}*"))
    with step_lock(tmp_path):  # given back: no waiting
        pass


@pytest.mark.slow
def test_a_run_without_locks_makes_the_bytes_of_one_with_them(
    tmp_path: Path, tiny_model: Path, paragraphs: list[str], refuse: Callable[..., None]
) -> None:
    locked = make_recipe(tmp_path / "locked", tiny_model, paragraphs[:6])
    locked.run()
    recipe = make_recipe(tmp_path / "free", tiny_model, paragraphs[:6])
    refuse(errno.ENOLCK, below=recipe.root)
    events = recipe.run()
    assert events.finished == ["documents", "signals"]
    for name in events.finished:
        assert table_bytes(recipe.step(name).folder) == table_bytes(locked.step(name).folder)


def test_a_library_that_needs_locks_is_told_apart_from_its_input(
    tmp_path: Path, tiny_model: Path, paragraphs: list[str], refuse: Callable[..., None]
) -> None:
    recipe = make_recipe(tmp_path, tiny_model, paragraphs[:6])
    refuse(errno.ENOLCK)
    with pytest.raises(ConfigError, match=r"whose file system has no file locks .* set HF_HOME"):
        recipe.run()


def test_a_dead_runs_lease_is_taken_over_by_one_of_two(
    tmp_path: Path, refuse: Callable[..., None]
) -> None:
    refuse(errno.ENOLCK)
    (tmp_path / LEASE_FILE).write_text("process 1 on a machine that is gone, 0")
    told: list[str] = []
    outcomes: list[str] = []
    refused = threading.Event()

    def run() -> None:
        try:
            with step_lock(tmp_path, warned=told.append):
                outcomes.append("held")
                refused.wait(60)
        except StoreError as error:
            outcomes.append(str(error))
            refused.set()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes)[0] == "held" or sorted(outcomes)[1] == "held"
    assert any(f"{tmp_path} is being written by {OURS}; wait" in said for said in outcomes)
    assert any("is held by process 1 on a machine that is gone: looking" in line for line in told)


def test_a_lease_that_another_has_taken_is_told(
    tmp_path: Path, refuse: Callable[..., None]
) -> None:
    refuse(errno.ENOLCK)
    lost = threading.Event()
    theirs = tmp_path / LEASE_FILE

    def warned(line: str) -> None:
        if line.startswith(f"another run has taken {tmp_path}"):
            lost.set()

    with step_lock(tmp_path, warned=warned):
        theirs.write_text("process 2 on another machine, 1")  # as if we had slept
        assert lost.wait(60)
    assert theirs.exists()  # it is the other's to give back


@pytest.mark.parametrize("calls", [("flock", "lockf"), ("lockf",)], ids=str)
def test_groups_of_shards_without_locks(
    calls: tuple[str, ...], tmp_path: Path, refuse: Callable[..., None]
) -> None:
    refuse(errno.ENOLCK, *calls)
    with (
        shards_lock(tmp_path, range(4)),
        shards_lock(tmp_path, range(4, 8)),
        pytest.raises(StoreError, match=f"is being written by {OURS}; wait"),
    ):
        shards_lock(tmp_path, range(4, 8)).__enter__()
    (tmp_path / LEASE_FILE).write_text("process 1 on a machine that is gone, 0")
    with shards_lock(tmp_path, range(4)):  # a whole run that died holds nobody up for ever
        pass


def test_a_lock_that_fails_otherwise_is_told_as_it_is(
    tmp_path: Path, refuse: Callable[..., None]
) -> None:
    refuse(errno.EIO)
    for lock in (step_lock(tmp_path), shards_lock(tmp_path, range(4))):
        with pytest.raises(StoreError, match=r"cannot lock .*/\.lock: Input/output error; mend"):
            lock.__enter__()


def test_bytes_of_shards_that_another_process_has_are_taken_whatever_the_system_says(
    tmp_path: Path, refuse: Callable[..., None]
) -> None:
    for code in (errno.EACCES, errno.EAGAIN):
        refuse(code, "lockf")
        with pytest.raises(StoreError, match="another run of shards 0:4 or some of them"):
            shards_lock(tmp_path, range(4)).__enter__()


def test_copies_of_a_store_need_locks_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: Callable[..., None]
) -> None:
    refuse(errno.ENOLCK)
    where = "set TEACHERCACHE_CACHE to a folder on a disk of this machine"
    with pytest.raises(StoreError, match=f"has no file locks .No locks available.; {where}"):
        shard_cache.hold(ObjectPath("s3://bucket/x"), "a" * 64)
    saved = SavedCheckpoints(ObjectPath("s3://bucket/step"), tmp_path)
    monkeypatch.setattr(SavedCheckpoints, "_latest", lambda _: {"name": "checkpoint-1"})
    with pytest.raises(StoreError, match=f"has no file locks .No locks available.; {where}"):
        saved.fetch()


def test_a_copy_is_deleted_with_a_lock_that_nfs_gives(tmp_path: Path) -> None:
    """NFS refuses LOCK_EX (EBADF) of a file that is open for reading alone."""
    modes: list[int] = []
    plain = fcntl.flock

    def flock(stream: "object", mode: int) -> None:
        modes.append(fcntl.fcntl(stream, fcntl.F_GETFL) & os.O_ACCMODE)  # type: ignore[call-overload]
        plain(stream, mode)  # type: ignore[arg-type]

    copy = tmp_path / ("a" * 64)
    copy.write_bytes(b"x")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fcntl, "flock", flock)
        assert shard_cache._remove_unused(copy)
    assert modes == [os.O_RDWR] and not copy.exists()


def test_a_lease_file_is_as_old_as_it_was_seen_unchanged(tmp_path: Path) -> None:
    path = lease_file.LeaseFile(tmp_path / LEASE_FILE)
    assert path.info() is None
    version = path.create(b"a holder")
    assert version is not None and path.create(b"another") is None
    began = time.monotonic()
    first = path.info()
    assert isinstance(first, ObjectInfo) and first.etag == version
    os.utime(path.path, (0, 0))  # no clock of a server or another machine is asked
    again = path.info()
    assert again is not None and again.age_s <= time.monotonic() - began
    assert path.replace(b"a", version) is not None and path.read_bytes() == b"a"
    assert path.replace(b"b", version) is None and path.read_bytes() == b"a"
    path.unlink()
    assert path.replace(b"b", version) is None and path.info() is None


@pytest.mark.parametrize("first", [None, range(2)])
def test_a_forked_child_does_not_hold_the_lock_of_its_parent(
    tmp_path: Path, first: range | None
) -> None:
    """A loader's worker outlives a killed run by seconds: the next run need not wait for it."""
    forked, ends = os.pipe(), os.pipe()
    held = step_lock(tmp_path) if first is None else shards_lock(tmp_path, first)
    with held:
        child = os.fork()
        if child == 0:
            os.write(forked[1], b"x")
            os.read(ends[0], 1)
            os._exit(0)
        os.read(forked[0], 1)
        with pytest.raises(StoreError, match="is being written by"), step_lock(tmp_path):
            pass
    try:
        with step_lock(tmp_path):
            pass
    finally:
        os.write(ends[1], b"x")
        os.waitpid(child, 0)
