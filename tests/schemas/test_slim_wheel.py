"""The wheel ``teachercache-schemas``: what it holds, and its README's loop where little else is."""

import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tests.fixtures.cached_data import make_cached_data
from tests.house.tree import REPOSITORY

SLIM = REPOSITORY / "schemas"
# torch's own requirements, as far as importing and training need them.
TORCH_NEEDS = (
    *("typing_extensions.py", "sympy", "mpmath", "networkx", "jinja2", "markupsafe"),
    *("fsspec", "filelock", "torchgen"),
)
SCRIPT = """
import sys
import teachercache_schemas
assert not {"torch", "schemas", "stages", "fsspec"} & set(sys.modules)
documents, signals = sys.argv[1:]
epochs, first = 8, 0.0
import torch
torch.manual_seed(0)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.read = torch.nn.Embedding(307, 32), torch.nn.GRU(32, 32, batch_first=True)
        self.head = torch.nn.Linear(32, 307)

    def forward(self, ids_BT):
        return self.head(self.read(self.embed(ids_BT))[0])


model = Model()
"""
AFTER = """
import schemas
assert schemas.MINE
assert not {"stages", "pipeline", "transformers", "pydantic"} & set(sys.modules)
print(float(first), float(loss))
"""


def built(folder: Path) -> Path:
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    command = [*build, "--no-index", "--wheel-dir", str(folder), str(SLIM)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("teachercache_schemas-*.whl")
    return wheel


def test_it_holds_the_folder_under_another_name(tmp_path: Path) -> None:
    names = set(zipfile.ZipFile(built(tmp_path)).namelist())
    packed = {name for name in names if ".dist-info" not in name}
    modules = {path.relative_to(SLIM).as_posix() for path in SLIM.rglob("*.py")}
    assert packed == {f"teachercache_schemas/{name}" for name in modules}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_it_has_version_and_licence_of_the_other_and_two_dependencies() -> None:
    slim, whole = (
        tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        for folder in (SLIM, REPOSITORY)
    )
    assert slim["version"] == whole["version"]
    assert (SLIM / "LICENSE").read_bytes() == (REPOSITORY / "LICENSE").read_bytes()
    assert slim["requires-python"] == whole["requires-python"]
    assert slim["dependencies"] == ["numpy>=2.0", "pyarrow>=20"]
    assert set(slim["dependencies"]) < set(whole["dependencies"])


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of torch, numpy, pyarrow and the wheel: links, as torch is large."""
    folder = tmp_path_factory.mktemp("slim")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    source = Path(str(distribution("torch").locate_file("")))
    linked = ("torch", "numpy", "numpy.libs", "pyarrow", *TORCH_NEEDS)
    for name in linked:
        if (source / name).exists():
            (packages / name).symlink_to(source / name)
    zipfile.ZipFile(built(folder)).extractall(packages)
    return folder / "venv" / "bin" / "python"


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["threshold", "threshold_tau"])
def test_the_loop_of_its_readme_trains(python: Path, tmp_path: Path, encoding: str) -> None:
    """In a folder with a ``schemas`` of the user's, which stays theirs."""
    loop = (SLIM / "README.md").read_text().split("```python\n")[1].partition("```")[0]
    assert len([line for line in loop.splitlines() if line.strip()]) <= 20
    kept = loop.replace(
        "        loss.backward()", "        first = first or float(loss)\n        loss.backward()"
    )
    (tmp_path / "schemas").mkdir()
    (tmp_path / "schemas" / "__init__.py").write_text("MINE = True\n")
    script = tmp_path / "script.py"
    script.write_text(f"{SCRIPT}\n{kept}\n{AFTER}")
    data = make_cached_data(tmp_path / "data")
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, script, *data.tables(encoding)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, last = map(float, done.stdout.split())
    assert last < 0.7 * first
