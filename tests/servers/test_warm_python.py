"""A fork of the warm Python is a process like any other, which is what other tests take it for."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.servers.warm_python import WarmProcess

pytestmark = pytest.mark.slow

SAYS = """
import json, os, sys
place = [os.getpid(), os.getsid(0), os.getcwd(), os.environ.get("WORD"), sys.argv, sys.stdin.read()]
print(json.dumps(place))
sys.stderr.write("and so it ended")
sys.exit(3)
"""
WAITS = "import time; print('here', flush=True); time.sleep(3600)"


def run(code: str, *arguments: str, **env: str) -> WarmProcess:
    return WarmProcess(code, ["-c", *arguments], {**os.environ, **env})


def test_it_has_its_own_id_group_folder_words_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    process = run(SAYS, "one", "two", WORD="of its own")
    out, err = process.communicate()
    said = f'[{process.pid}, {process.pid}, "{tmp_path}", "of its own", ["-c", "one", "two"], ""]\n'
    assert (out, err, process.returncode) == (said, "and so it ended", 3)
    assert run("import os; print('WORD' in os.environ)").communicate()[0] == "False\n"


def test_it_ends_by_a_signal_and_is_there_until_somebody_has_asked() -> None:
    process = run(WAITS)
    assert process.stdout is not None and process.stdout.readline() == "here\n"
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    os.kill(process.pid, 0)  # its id is no other's yet
    assert process.wait() == process.returncode == -signal.SIGKILL
    process.kill()  # as with any process: it has ended, nothing happens


def test_an_error_is_told_as_python_tells_it() -> None:
    process = run("raise ValueError('so it is')")
    assert process.communicate()[1].endswith("ValueError: so it is\n")
    assert process.returncode == 1


def test_what_all_need_is_imported_and_no_thread_is_started() -> None:
    code = """
import os, sys
print(*(name in sys.modules for name in ("torch", "vllm", "ray")))
print(len(os.listdir("/proc/self/task")))
"""
    expected = "True False False\n1\n"
    assert run(code, OMP_NUM_THREADS="1").communicate()[0] == expected


def test_its_processes_are_spawned_as_those_of_any_script() -> None:
    code = """
import multiprocessing
with multiprocessing.get_context("spawn").Pool(1) as pool:
    print(pool.apply(abs, (-7,)))
"""
    assert run(code).communicate()[0] == "7\n"
