"""Objects on a real S3 server: whole or not there, faults made good or said in one line."""

import hashlib
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from schemas.errors import ConfigError, StoreError
from schemas.storage import object_path as object_store
from schemas.storage.files import as_folder, read_if_there, read_many
from schemas.storage.object_path import ObjectPath
from tests.servers.s3_server import (
    CUT_REPLY,
    CUT_REQUEST,
    ERROR,
    PASS,
    SLOW,
    FaultyProxy,
    Server,
    faulty_proxy,
    looking_at_who_asks,
    place,
    running_server,
    use_endpoint,
)

MEGABYTE = 1 << 20
OTHERS = (ERROR, CUT_REPLY, SLOW)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture(autouse=True)
def endpoint(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, server.url)


@pytest.fixture
def root(server: Server, endpoint: None) -> str:
    return server.new_root()


@pytest.fixture
def proxy(server: Server, root: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy that this process's requests go through."""
    with faulty_proxy(server) as proxy:
        use_endpoint(monkeypatch, proxy.url)
        yield proxy


def test_places_are_told_apart_by_their_scheme() -> None:
    assert as_folder("s3://bucket/a//b/") == ObjectPath("s3://bucket/a/b")
    assert as_folder("gs://bucket") / "x" == ObjectPath("gs://bucket/x")
    assert as_folder("file:///a/b") == as_folder("file://localhost/a/b") == Path("/a/b")
    assert as_folder("cache") == Path("cache")
    path = ObjectPath("s3://bucket/a/b.json")
    assert (path.name, str(path.parent)) == ("b.json", "s3://bucket/a")
    assert pickle.loads(pickle.dumps(path)) == path
    for wrong in ("http://host/a", "s3://", "gs:///"):
        with pytest.raises(ConfigError, match="expected"):
            as_folder(wrong)


def test_an_object_is_whole_or_not_there(root: str, tmp_path: Path) -> None:
    path = place(root, "a", "x.json")
    assert path.info() is None and not path.is_file() and read_if_there(path) is None
    path.write_bytes(b"one")
    info = path.info()
    assert info is not None and info.num_bytes == 3 and 0 <= info.age_s < 60
    assert info.sha256 == path.sha256() == hashlib.sha256(b"one").hexdigest()
    assert path.read_text() == "one"
    path.unlink()
    path.unlink()
    assert not path.is_file()


def test_many_are_read_at_once_in_their_order(root: str, proxy: FaultyProxy) -> None:
    paths = [place(root, f"{index}.json") for index in range(10)]
    for path in paths[::3]:
        path.write_bytes(path.name.encode())
    proxy.seen.clear()
    found = read_many(paths)
    assert found == [p.name.encode() if i % 3 == 0 else None for i, p in enumerate(paths)]
    assert read_many(paths[:1]) == [b"0.json"] and read_many([]) == []
    assert {method for method, _ in proxy.seen} == {"GET"}  # and nothing is listed
    assert len(proxy.seen) == 11 and not proxy.count("GET", "list-type")


def test_only_one_makes_an_object_and_only_who_knows_it_replaces_it(root: str) -> None:
    path = place(root, ".lock")
    first = path.create(b"one")
    assert first is not None and path.create(b"two") is None
    second = path.replace(b"three", first)
    assert second not in (None, first) and path.replace(b"four", first) is None
    assert path.read_bytes() == b"three"
    assert place(root, "none").replace(b"x", first) is None


@pytest.mark.slow
def test_a_large_object_goes_up_and_down_in_parts(
    root: str, server: Server, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "PART_BYTES", 5 * MEGABYTE)
    monkeypatch.setattr(object_store, "RANGE_BYTES", 4 * MEGABYTE)
    file, path = tmp_path / "file", place(root, "large")
    file.write_bytes(os.urandom(12 * MEGABYTE + 1))
    path.upload(file)
    assert proxy.count("PUT", "partNumber") == 3 and not server.uploads(root)
    info = path.info()
    assert info is not None and info.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    path.download(tmp_path / "copy", info.num_bytes)
    assert (tmp_path / "copy").read_bytes() == file.read_bytes()
    assert path.sha256() == info.sha256


def test_an_upload_that_fails_leaves_nothing(
    root: str, server: Server, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setattr(object_store, "PART_BYTES", 5 * MEGABYTE)
    file, path = tmp_path / "file", place(root, "large")
    file.write_bytes(bytes(12 * MEGABYTE))
    proxy.fault = lambda method, path: ERROR if "partNumber=3" in path else PASS
    with pytest.raises(StoreError, match=r"cannot write .*An internal error.*run again"):
        path.upload(file)
    assert not server.uploads(root) and not path.is_file()
    # A process that is killed cannot end its upload: the next one with the lock does.
    bucket, key = root.split("/")[2], "cache/step/large"
    server.client.create_multipart_upload(Bucket=bucket, Key=key)
    server.client.create_multipart_upload(Bucket=bucket, Key="cache/step-2/large")
    assert place(root, "step").abort_uploads() == 1
    assert [upload["Key"] for upload in server.uploads(root)] == ["cache/step-2/large"]


@pytest.mark.parametrize(
    "fault",
    [CUT_REQUEST, *(pytest.param(fault, marks=pytest.mark.slow) for fault in OTHERS)],
)
def test_faults_that_pass_are_made_good(
    root: str, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Every second request meets the fault."""
    monkeypatch.setattr(object_store, "READ_S", 1)
    monkeypatch.setattr(FaultyProxy, "slow_s", 1.5)
    object_store._file_system.cache_clear()
    data, file = os.urandom(200_000), tmp_path / "file"
    file.write_bytes(data)
    proxy.fault = lambda method, path: fault if len(proxy.seen) % 2 else PASS
    path = place(root, "x")
    path.upload(file)
    assert path.read_bytes() == data
    path.download(tmp_path / "copy", len(data))
    assert (tmp_path / "copy").read_bytes() == data
    assert len(proxy.seen) >= 6


def test_a_store_that_does_not_answer_is_one_line(
    root: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    proxy.fault = lambda method, path: ERROR
    with pytest.raises(StoreError) as caught:
        place(root, "x").write_bytes(b"x")
    assert str(caught.value).startswith(f"cannot write {root}/x, tried again and again: ")
    assert len(proxy.seen) == 2
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StoreError, match="Could not connect to the endpoint URL"):
        read_if_there(place(root, "x"))


def test_a_missing_bucket_and_missing_credentials_are_the_users_to_mend(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="bucket 'no-such-bucket' does not exist") as caught:
        read_if_there(ObjectPath("s3://no-such-bucket/cache/manifest.json"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="bucket 'no-such-bucket' does not exist"):
        ObjectPath("s3://no-such-bucket/x").write_bytes(b"x")
    with pytest.raises(ConfigError, match="bucket 'no-such-bucket' does not exist"):
        read_many([ObjectPath("s3://no-such-bucket/x"), ObjectPath("s3://no-such-bucket/y")])
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", "/nonexistent")
    object_store._file_system.cache_clear()
    with pytest.raises(ConfigError, match="no credentials"):
        read_if_there(place(root, "x"))


def test_credentials_that_are_refused_are_the_users_to_mend(
    root: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with looking_at_who_asks(server) as key:
        with pytest.raises(ConfigError, match=r"refuses this machine's credentials \(InvalidAcc"):
            read_if_there(place(root, "x"))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        object_store._file_system.cache_clear()
        with pytest.raises(ConfigError, match=r"\(SignatureDoesNotMatch\)") as caught:
            read_if_there(place(root, "x"))
        assert key["AccessKeyId"] not in str(caught.value)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        object_store._file_system.cache_clear()
        with pytest.raises(ConfigError, match=r"no permission \(AccessDenied\)"):
            read_if_there(place(root, "x"))


def test_a_scheme_whose_package_is_missing_names_it() -> None:
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from schemas.storage.object_path import ObjectPath\n"
        "try: ObjectPath('s3://b/x').read_bytes()\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "ConfigError s3:// needs s3fs: pip install teachercache[s3]\n"


def test_a_forked_process_has_a_connection_of_its_own(root: str) -> None:
    """The loader's workers are forked; fsspec's thread does not come along."""
    path = place(root, "x")
    path.write_bytes(b"x")
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if path.read_bytes() == b"x" else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_stores_without_conditions_work_by_the_same_calls() -> None:
    """What ``gs://`` goes through, on fsspec's file system in memory."""
    path = ObjectPath("memory://bucket/a/x")
    assert path.info() is None
    etag = path.create(b"one")
    assert etag is not None and path.create(b"two") is None
    changed = path.replace(b"three", etag)
    assert changed is not None and path.replace(b"four", etag) is None
    assert path.read_bytes() == b"three" and path.read_range(1, 3) == b"hr"
    assert path.parent.find() == {path: 5}
    assert read_many([path, path.parent / "y"]) == [b"three", None]
    path.unlink()
    assert not path.is_file()
