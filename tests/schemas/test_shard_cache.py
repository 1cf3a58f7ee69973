"""Copies of objects on this machine: fetched once, checked, shared, and never above the limit."""

import fcntl
import hashlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from schemas.dataset import open_dataset
from schemas.errors import ConfigError, StoreError
from schemas.open_table import HELD_SHARDS
from schemas.storage.files import atomic_file
from schemas.storage.object_path import ObjectPath
from schemas.storage.shard_cache import LIMIT, hold, local_file, local_files
from tests.schemas.test_store import NUM_SHARDS, ROWS, document, write_documents, write_signals
from tests.servers.s3_server import (
    FaultyProxy,
    Server,
    faulty_proxy,
    place,
    running_server,
    use_endpoint,
)

KILOBYTE = 1000


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture
def proxy(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with faulty_proxy(server) as proxy:
        use_endpoint(monkeypatch, proxy.url)
        monkeypatch.setenv("TEACHERCACHE_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv(LIMIT, raising=False)
        yield proxy


@pytest.fixture
def root(server: Server, proxy: FaultyProxy) -> str:
    return server.new_root()


def write_object(path: ObjectPath, num_bytes: int) -> str:
    """Write an object of random bytes; return its checksum."""
    data = os.urandom(num_bytes)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def cached(tmp_path: Path) -> dict[str, int]:
    """The files that count against the limit, and their sizes."""
    files = (tmp_path / "cache" / "shards").iterdir()
    return {path.name: path.stat().st_size for path in files if path.suffix != ".lock"}


def test_a_file_is_fetched_once_whatever_its_place(
    root: str, proxy: FaultyProxy, tmp_path: Path
) -> None:
    path, twin = place(root, "x"), place(root, "twin")
    sha256 = write_object(path, 300)
    twin.write_bytes(path.read_bytes())
    proxy.seen.clear()
    for where in (path, path, twin):
        with local_file(where, sha256) as file:
            assert hashlib.sha256(file.read_bytes()).hexdigest() == sha256
    assert proxy.count("GET") == 1
    assert cached(tmp_path) == {sha256: 300}


def test_another_checksum_is_refused_and_not_kept(root: str, tmp_path: Path) -> None:
    path = place(root, "x")
    write_object(path, 300)
    with pytest.raises(StoreError, match=r"has sha256 .*, its manifest says 000000000000"):
        hold(path, "0" * 64)
    with pytest.raises(StoreError, match="is missing"):
        hold(place(root, "none"), "0" * 64)
    assert cached(tmp_path) == {}


@pytest.mark.slow
def test_room_is_made_by_what_was_used_least_recently(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT, str(3 * KILOBYTE / 1e9))
    paths = [place(root, f"{index}") for index in range(4)]
    sums = [write_object(path, KILOBYTE) for path in paths]
    for path, sha256 in zip(paths[:3], sums[:3], strict=True):
        with local_file(path, sha256):
            pass
        time.sleep(0.01)
    with local_file(paths[0], sums[0]), local_file(paths[3], sums[3]):
        assert set(cached(tmp_path)) == {sums[0], sums[2], sums[3]}
    # A file in use stays, however long ago it was opened; a larger one than the limit never comes.
    old = hold(paths[2], sums[2])
    assert old is not None
    for path, sha256 in zip(paths[:2], sums[:2], strict=True):
        time.sleep(0.01)
        with local_file(path, sha256):
            assert old.path.exists()
    large = write_object(place(root, "large"), 4 * KILOBYTE)
    assert hold(place(root, "large"), large) is None
    with local_file(place(root, "large"), large) as file:
        assert file.stat().st_size == 4 * KILOBYTE
    assert not file.exists() and sum(cached(tmp_path).values()) <= 3 * KILOBYTE
    old.close()
    monkeypatch.setenv(LIMIT, "plenty")
    with pytest.raises(ConfigError, match="is 'plenty', expected a number of gigabytes"):
        hold(paths[1], "f" * 64)


@pytest.mark.parametrize("shares_a_lock", [False, True])
def test_what_a_killed_process_had_on_its_way_is_cleared(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares_a_lock: bool
) -> None:
    monkeypatch.setenv(LIMIT, str(3 * KILOBYTE / 1e9))
    path, data = place(root, "x"), bytes(2 * KILOBYTE)
    path.write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    prefix = sha256[:2] if shares_a_lock else "aa"  # a lock is of all checksums that begin alike
    assert len({sha256[:2], "aa", "bb"}) == 3
    folder = tmp_path / "cache" / "shards"
    folder.mkdir(parents=True)
    (folder / f"{prefix}{'a' * 62}.part").write_bytes(bytes(2 * KILOBYTE))
    (folder / f"{'b' * 64}.part").write_bytes(bytes(KILOBYTE))
    with (folder / "bb.lock").open("a+b") as fetching:
        fcntl.flock(fetching, fcntl.LOCK_EX)  # as the process that is bringing it does
        assert hold(path, sha256) is not None
        assert cached(tmp_path) == {sha256: 2 * KILOBYTE, f"{'b' * 64}.part": KILOBYTE}


def read_all(paths: list[ObjectPath], sums: list[str], seed: int, highest: "object") -> None:
    """Read the objects in some order, twice, and look at the size of the cache all along."""
    folder = Path(os.environ["TEACHERCACHE_CACHE"]) / "shards"
    for index in np.random.default_rng(seed).permutation(2 * len(paths)) % len(paths):
        with local_file(paths[index], sums[index]) as file:
            assert hashlib.sha256(file.read_bytes()).hexdigest() == sums[index]
            sizes = []
            for path in folder.iterdir():
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:
                    continue
            highest.put(sum(sizes))  # type: ignore[attr-defined]


@pytest.mark.slow
def test_processes_share_the_cache_and_never_exceed_the_limit(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT, str(5 * KILOBYTE / 1e9))
    paths = [place(root, f"{index}") for index in range(12)]
    sums = [write_object(path, KILOBYTE) for path in paths]
    spawn = multiprocessing.get_context("spawn")
    highest = spawn.Queue()
    processes = [
        spawn.Process(target=read_all, args=(paths, sums, seed, highest)) for seed in range(3)
    ]
    for process in processes:
        process.start()
    sizes = [highest.get(timeout=120) for _ in range(3 * 24)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert 4 * KILOBYTE <= max(sizes) <= 5 * KILOBYTE


def test_a_folder_of_files_is_links_to_copies(root: str, tmp_path: Path) -> None:
    folder = place(root, "model")
    files = {name: write_object(folder / name, 50) for name in ("a.json", "head/b.bin")}
    made = local_files(folder, files)
    assert local_files(folder, files) == made
    found = {str(p.relative_to(made)): p for p in made.rglob("*") if p.is_file()}
    assert set(found) == set(files) and all(path.is_symlink() for path in found.values())
    for name, path in found.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == files[name]
    assert local_files(tmp_path, files) == tmp_path


def upload_table(folder: Path, root: str) -> ObjectPath:
    for path in folder.iterdir():
        with atomic_file(place(root, folder.name, path.name)) as stream:
            stream.write(path.read_bytes())
    return place(root, folder.name)


@pytest.mark.parametrize("shards_that_fit", [10, 2, 0])
def test_rows_from_a_store_are_those_of_the_disk(
    root: str,
    proxy: FaultyProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shards_that_fit: int,
) -> None:
    """Also where the tables are larger than the cache: then batches are fetched one by one."""
    documents, signals = tmp_path / "documents", tmp_path / "signals"
    write_documents(documents)
    write_signals(signals, [document(index) for index in range(NUM_SHARDS * ROWS)])
    expected = open_dataset([documents, signals])
    places = [upload_table(folder, root) for folder in (documents, signals)]
    largest = max(path.stat().st_size for path in tmp_path.rglob("*.arrow"))
    limit = shards_that_fit * largest
    monkeypatch.setenv(LIMIT, str(limit / 1e9))
    proxy.seen.clear()
    found = open_dataset([str(place) for place in places])
    assert len(found) == len(expected) > NUM_SHARDS * ROWS / 2
    for index in np.random.default_rng(0).permutation(len(found)):
        row, same = found[int(index)], expected[int(index)]
        assert row.keys() == same.keys()
        assert all(np.array_equal(row[name], same[name]) for name in row)
        assert sum(cached(tmp_path).values()) <= limit if shards_that_fit else True
    if shards_that_fit == 10:  # three shards and one, each once; manifest and list of two tables
        assert proxy.count("GET") == NUM_SHARDS + 1 + 4
    held = [len(part._readers) for part in found._parts]
    assert max(held) <= HELD_SHARDS
