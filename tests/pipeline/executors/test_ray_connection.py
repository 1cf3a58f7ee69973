"""A head of Ray that listens before it can serve a client."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.executors.ray_cluster import connection
from schemas.errors import EngineError

PLACE = connection.__name__
SAID = "Initialization failure from server:\nTraceback ...\nRuntimeError: the agent is not there"


@pytest.mark.parametrize("failures", [2, 10**9])
def test_a_head_that_cannot_serve_a_client_yet_is_asked_again(
    failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def init(**arguments: Any) -> None:
        asked.append(arguments["address"])
        if len(asked) <= failures:
            raise ConnectionAbortedError(SAID)

    now = iter(range(10**6))
    monkeypatch.setattr(f"{PLACE}._require_answer", lambda address: None)
    monkeypatch.setattr(f"{PLACE}.ray.init", init)
    monkeypatch.setattr(f"{PLACE}.ray.shutdown", lambda: None)
    monkeypatch.setattr(f"{PLACE}.time.sleep", lambda seconds: None)
    monkeypatch.setattr(f"{PLACE}.time.monotonic", lambda: float(next(now)))
    if failures == 2:
        with connection.connected("ray://head:1", tmp_path, num_cpus=1):
            assert asked == ["ray://head:1"] * 3
        return
    with (
        pytest.raises(EngineError, match="a client failed: RuntimeError: the agent is not there"),
        connection.connected("ray://head:1", tmp_path, num_cpus=1),
    ):
        pass
    assert len(asked) > 50


def test_one_attempt_may_take_as_long_as_a_head_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine: then it is asked once more all the same."""
    asked: list[Any] = []

    def init(**arguments: Any) -> None:
        asked.append(arguments["address"])
        if len(asked) == 1:
            raise ConnectionAbortedError(SAID)

    monkeypatch.setattr(f"{PLACE}._require_answer", lambda address: None)
    monkeypatch.setattr(f"{PLACE}.ray.init", init)
    monkeypatch.setattr(f"{PLACE}.ray.shutdown", lambda: None)
    monkeypatch.setattr(f"{PLACE}.time.sleep", lambda seconds: None)
    monkeypatch.setattr(f"{PLACE}.time.monotonic", lambda: 1000.0 * len(asked))
    with connection.connected("ray://head:1", tmp_path, num_cpus=1):
        assert asked == ["ray://head:1"] * 2
