"""A folder or file in an object store: whole objects by GET, HEAD and PUT, never a rename.

An object exists whole or not at all, so the commit of a shard is one PUT of its record after the
PUT of its bytes. Nothing here lists a folder to find out what is finished; ``find`` and ``folders``
are for who asks what lies somewhere, ``abort_uploads`` for what a killed upload left.

The store is reached through fsspec (s3fs for ``s3://``, gcsfs for ``gs://``), which is imported
when the first object is. Credentials, region and endpoint come from the provider chain of the
machine alone: an ``ObjectPath`` holds a URL and nothing else.
"""

import hashlib
import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ConfigError, StoreError
from .store_errors import code_of, told

SCHEMES = ("s3", "gs")
CONNECT_S, READ_S = 10, 30  # a request is given up, and tried again, when nothing moves so long
ATTEMPTS = 6  # of a request that failed, with growing pauses; AWS_MAX_ATTEMPTS sets another number
RANGE_BYTES = 32 << 20  # what one GET brings of a large object
PART_BYTES = 50 << 20  # an object of two parts or more is uploaded part by part
REQUESTS_AT_ONCE = 32
_PACKAGES = {
    "s3": "s3fs: pip install teachercache[s3]",
    "gs": "gcsfs: pip install teachercache[gs]",
}
# What a conditional PUT is answered: the object is another, has gone, or is being written now.
_NOT_AS_EXPECTED = ("PreconditionFailed", "412", "NoSuchKey", "404", "ConditionalRequestConflict")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a store says of an object: bytes, our checksum of them, its version, seconds of age."""

    num_bytes: int
    sha256: str
    etag: str
    age_s: float


@dataclass(frozen=True, slots=True, order=True)
class ObjectPath:
    """The place of an object, or of a folder of them; what it offers is named as in pathlib.

    Every call raises StoreError, or ConfigError for a missing bucket and for credentials that are
    refused, each in one line.
    """

    url: str

    def __str__(self) -> str:
        """Return the URL."""
        return self.url

    def __truediv__(self, name: str) -> "ObjectPath":
        """Return what lies below under ``name``."""
        return ObjectPath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rsplit("/", 1)[1]

    @property
    def parent(self) -> "ObjectPath":
        """The folder."""
        return ObjectPath(self.url.rsplit("/", 1)[0])

    def absolute(self) -> "ObjectPath":
        """Return itself: a URL is absolute."""
        return self

    def info(self) -> ObjectInfo | None:
        """Return what the store says of the object, None where there is none (HEAD)."""
        with suppress(FileNotFoundError), told("look for", self.url):
            return _info(self)
        return None

    def is_file(self) -> bool:
        """Whether there is such an object (HEAD)."""
        return self.info() is not None

    def is_dir(self) -> bool:
        """A store has no folders: one exists as soon as it is written to."""
        return True

    def read_bytes(self) -> bytes:
        """Return a small object; raises FileNotFoundError where there is none (GET)."""
        with told("read", self.url):
            return bytes(_store(self).cat_file(self.url, **_one_get(self)))

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return a small object as text; raises FileNotFoundError where there is none."""
        return self.read_bytes().decode(encoding)

    def read_range(self, start: int, stop: int) -> bytes:
        """Return the bytes from ``start`` up to ``stop``, which the object must have."""
        with told("read", self.url):
            return bytes(_store(self).cat_file(self.url, start=start, end=stop))

    def download(self, file: Path, num_bytes: int) -> None:
        """Write the object's bytes over those of ``file``, which may be there already."""
        try:
            with file.open("r+b" if file.exists() else "wb") as stream:
                for start in range(0, num_bytes, RANGE_BYTES):
                    stream.write(self.read_range(start, min(start + RANGE_BYTES, num_bytes)))
                stream.truncate()
                stream.flush()
                os.fsync(stream.fileno())
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreError(
                f"cannot write {file}, a copy of {self}: {error.strerror or error}; free or open "
                f"it, or set TEACHERCACHE_CACHE (and TMPDIR) to another folder"
            ) from error

    def sha256(self) -> str:
        """Return the checksum of the bytes, all of which are fetched; FileNotFoundError without."""
        digest = hashlib.sha256()
        with told("read", self.url):
            num_bytes = _info(self).num_bytes
            for start in range(0, num_bytes, RANGE_BYTES):
                digest.update(self.read_range(start, min(start + RANGE_BYTES, num_bytes)))
        return digest.hexdigest()

    def write_bytes(self, data: bytes) -> None:
        """Write a small object, its checksum beside it (one PUT)."""
        with told("write", self.url):
            sha256 = hashlib.sha256(data).hexdigest()
            _store(self).pipe_file(self.url, data, **_with_checksum(self, sha256))

    def upload(self, file: Path) -> str:
        """Write a file, return its checksum: one PUT, or parts that are nothing until the last.

        Doing it again is harmless, so a request whose reply was lost is simply repeated.
        """
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        with told("write", self.url):
            _store(self).put_file(
                str(file), self.url, chunksize=PART_BYTES, **_with_checksum(self, sha256)
            )
        return sha256

    def create(self, data: bytes) -> str | None:
        """Write an object that must not be there yet; return its version, None where it is."""
        with told("write", self.url):
            try:
                _store(self).pipe_file(self.url, data, mode="create")
                return _info(self).etag
            except OSError as error:
                if isinstance(error, FileExistsError) or code_of(error) in _NOT_AS_EXPECTED:
                    return None
                raise

    def replace(self, data: bytes, etag: str) -> str | None:
        """Write over version ``etag`` of an object; return the new one, None where it has moved."""
        with told("write", self.url):
            if self.url.startswith("s3:"):
                try:
                    return str(_store(self).pipe_file(self.url, data, IfMatch=etag)["ETag"])
                except OSError as error:
                    if code_of(error) in _NOT_AS_EXPECTED:
                        return None
                    raise
            with suppress(FileNotFoundError):  # the others only look before they write
                if _info(self).etag == etag:
                    _store(self).pipe_file(self.url, data)
                    return _info(self).etag
            return None

    def rename(self, target: "ObjectPath") -> None:
        """Copy the object, its checksum with it, within the store; then delete it here."""
        with told("copy", self.url):
            _store(self).cp_file(self.url, target.url)
            _store(self).rm_file(self.url)

    def unlink(self) -> None:
        """Delete the object; a store says nothing where there is none."""
        with suppress(FileNotFoundError), told("delete", self.url):
            _store(self).rm_file(self.url)

    def find(self) -> "dict[ObjectPath, int]":
        """Return each object at or below this place and its bytes, by listing."""
        with suppress(FileNotFoundError), told("list", self.url):
            scheme = self.url.split("://")[0]
            found = _store(self).find(self.url, detail=True)
            return {
                ObjectPath(f"{scheme}://{name.lstrip('/')}"): int(entry["size"])
                for name, entry in found.items()
            }
        return {}

    def folders(self) -> "list[ObjectPath]":
        """Return the folders right below this place, by a listing that does not look into them."""
        with suppress(FileNotFoundError), told("list", self.url):
            found = _store(self).ls(self.url, detail=True)
            names = sorted(entry["name"] for entry in found if entry["type"] == "directory")
            return [self / name.rstrip("/").rsplit("/", 1)[1] for name in names]
        return []

    def abort_uploads(self, stems: Collection[str] | None = None) -> int:
        """End uploads in parts that were begun below here and not finished; return how many.

        ``stems`` are the names, up to a dot, of the objects in question, all by default. Call it
        with their lock held. Without the permission to list them there are none.
        """
        if not self.url.startswith("s3:"):
            return 0
        store, (bucket, key) = _store(self), _bucket_and_key(self)
        with told("list the uploads of", self.url), suppress(PermissionError):
            found = store.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/")
            uploads = [
                upload
                for upload in found.get("Uploads", [])
                if stems is None or upload["Key"].rsplit("/", 1)[1].split(".")[0] in stems
            ]
            for upload in uploads:
                names = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                store.call_s3("abort_multipart_upload", Bucket=bucket, **names)
            return len(uploads)
        return 0


def _store(path: ObjectPath) -> Any:
    """Return this process's file system for a path: a forked one must not use its parent's."""
    scheme = path.url.split("://")[0]
    return _file_system(scheme, os.getpid())


@cache
def _file_system(scheme: str, process: int) -> Any:
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme == "s3":
        attempts = os.environ.get("AWS_MAX_ATTEMPTS") or str(ATTEMPTS)
        if not attempts.isdigit():
            raise ConfigError(f"AWS_MAX_ATTEMPTS is '{attempts}', expected a number of attempts")
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_S,
            "read_timeout": READ_S,
            "retries": {"mode": "standard", "total_max_attempts": int(attempts)},
            "max_pool_connections": REQUESTS_AT_ONCE,
        }
    try:
        import fsspec

        store = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        other = "fsspec: pip install fsspec" if error.name == "fsspec" else scheme
        raise ConfigError(f"{scheme}:// needs {_PACKAGES.get(scheme, other)}") from error
    store.retries = 3  # of a reply that was cut off while it was read, or timed out
    return store


def _one_get(path: ObjectPath) -> dict[str, Any]:
    """Keep s3fs from asking for the size of a small object first, and from listing to find it."""
    return {"max_concurrency": 1} if path.url.startswith("s3:") else {}


def _with_checksum(path: ObjectPath, sha256: str) -> dict[str, Any]:
    return {"s3": {"Metadata": {"sha256": sha256}}, "gs": {"metadata": {"sha256": sha256}}}.get(
        path.url.split("://")[0], {}
    )


def _info(path: ObjectPath) -> ObjectInfo:
    store = _store(path)
    if path.url.startswith("s3:"):
        bucket, key = _bucket_and_key(path)
        found = store.call_s3("head_object", Bucket=bucket, Key=key)
        headers = found["ResponseMetadata"]["HTTPHeaders"]
        # Both times are the store's, so that no clock of ours has to be right.
        age = parsedate_to_datetime(headers["date"]) - found["LastModified"]
        sha256 = str(found.get("Metadata", {}).get("sha256", ""))
        return ObjectInfo(found["ContentLength"], sha256, found["ETag"], age.total_seconds())
    entry = store.info(path.url)
    if entry.get("type") != "file":
        raise FileNotFoundError(path.url)
    changed = entry.get("updated") or entry.get("created") or datetime.now(UTC)
    if isinstance(changed, str):
        changed = datetime.fromisoformat(changed)
    age_s = (datetime.now(UTC) - changed).total_seconds()
    sha256 = str((entry.get("metadata") or {}).get("sha256", ""))
    return ObjectInfo(int(entry["size"]), sha256, str(entry.get("etag") or changed), age_s)


def _bucket_and_key(path: ObjectPath) -> tuple[str, str]:
    bucket, _, key = path.url.split("://")[1].partition("/")
    return bucket, key
