"""The Python interface of README: the example runs on finished tables and trains a student."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.cached_data import make_cached_data

HELLO = Path(__file__).parents[2] / "examples" / "hello.py"


@pytest.mark.slow
def test_hello_shows_a_row_and_trains(tmp_path: Path) -> None:
    data = make_cached_data(tmp_path / "data")
    places = [data.teacher, *data.tables("threshold"), tmp_path / "out"]
    done = subprocess.run([sys.executable, HELLO, *places], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, weights, before, after = done.stdout.splitlines()
    assert first.startswith("token 1 is ") and weights.startswith("the teacher's: {")
    assert "'kl_to_teacher': " in after and after != before
    assert (tmp_path / "out" / "trained" / "checkpoint.json").is_file()
