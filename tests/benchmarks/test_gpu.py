"""The GPU script on a CPU: its comparisons with float64 are real, and what goes wrong is a line.

Dimensions: N = positions, V = vocabulary, K = kept entries.
"""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import encoding, losses, run, sparse_targets, training_step
from benchmarks.gpu.card import Card
from benchmarks.gpu.head_loss import Candidate, Loss, Problem, Race, ours
from benchmarks.gpu.moved_bytes import moved_bytes
from benchmarks.gpu.page import ABOUT, page
from benchmarks.gpu.report import Report
from stages.signals.scoring.encoding import ThresholdSample, threshold_sample
from tests.house.tree import REPOSITORY

CPU = Card(torch.device("cpu"))
SHAPE = (20, 16, 512)


def report(part: str = "part", *, seconds: float = 600.0, file: Path | None = None) -> Report:
    return Report(part, CPU, time.monotonic() + seconds, file)


def without_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("liger_kernel", "veomni"):
        monkeypatch.setitem(sys.modules, name, None)


PARTS: dict[str, tuple[Callable[..., None], int]] = {
    "encoding": (encoding.run, 2),
    "losses": (losses.run, 3),
    "sparse targets": (sparse_targets.run, 2),
    "training step": (training_step.run, 6),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.slow
def test_every_part_is_right_by_float64(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_peers(monkeypatch)
    work, num_bars = PARTS[part]
    found = report(part)
    work(found, quick=True)
    assert found.wrong == 0, found.notes
    assert [bar["ok"] for bar in found.bars] == [True] * num_bars
    assert all(bar["value"] > 0 for bar in found.bars)  # two ways, not one compared with itself
    assert not any("failed" in note for note in found.notes)
    expected = {"losses": "Liger, cross-entropy: skipped", "sparse targets": "VeOmni"}
    if part in expected:
        assert any(expected[part] in note and "import" in note for note in found.notes)


def test_a_wrong_candidate_has_no_time_and_the_others_go_on() -> None:
    def prepare(problem: Problem) -> Loss:
        right = ours("", "kd").prepare(problem)
        return lambda: 1.05 * right()

    def broken(problem: Problem) -> Loss:
        raise RuntimeError("no kernel image is available\nand much more")

    found = report("losses")
    candidates = [
        Candidate("wrong", "kd", prepare),
        Candidate("broken", "kd", broken),
        ours("right", "kd"),
    ]
    Race(found, Problem.random(CPU, SHAPE, torch.float32)).run(candidates)
    assert [row["what"] for row in found.rows] == ["right"]
    wrong, failed = found.notes
    assert wrong.startswith("losses: wrong: failed, ArithmeticError: not measured, as it is wrong")
    assert "loss 0.05" in wrong.replace("off ", "") and "head gradient" in wrong
    assert failed == "losses: broken: failed, RuntimeError: no kernel image is available"
    assert found.wrong == 2


def test_a_wrong_loss_of_ours_fails_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(self: Problem) -> Tensor:
        return torch.zeros(len(self.weights_NK))

    monkeypatch.setattr(Problem, "entropies_N", property(off))
    found = report("losses")
    Race(found, Problem.random(CPU, SHAPE, torch.float32)).run([ours("ours", "kl")])
    (bar,) = found.bars
    assert not bar["ok"] and found.wrong == 1 and not found.rows


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda ids_PK, heads_P: ids_PK.roll(1, dims=0), "not the likeliest"),
        (lambda ids_PK, heads_P: torch.cat([ids_PK[:, :-1], ids_PK[:, -2:-1]], 1), "a draw"),
        (lambda ids_PK, heads_P: (ids_PK, heads_P.add_(1))[0], "another size"),
    ],
)
def test_an_encoding_that_errs_is_found(
    harm: Callable[[Tensor, Tensor], Tensor], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = threshold_sample

    def wrong(*args: Any, **kwargs: Any) -> ThresholdSample:
        sample = right(*args, **kwargs)
        heads_P = sample.num_head_P.clone()
        ids_PK = harm(sample.token_ids_PK, heads_P)
        return replace(sample, token_ids_PK=ids_PK, num_head_P=heads_P)

    teacher = encoding.Teacher.random(CPU, (12, 2_048), torch.float32)
    assert encoding.error_against_float64(teacher.first(12)) < 1e-5
    monkeypatch.setattr(encoding, "threshold_sample", wrong)
    with pytest.raises(AssertionError, match=said):
        encoding.error_against_float64(teacher.first(12))


def test_bytes_are_counted_as_by_hand() -> None:
    block = torch.rand(40, 25)  # 4,000 bytes
    places = torch.zeros(40, 2, dtype=torch.int64)  # 640 bytes, of whose picks each has 4
    counted = [
        moved_bytes(lambda: block.exp()),
        moved_bytes(lambda: block.exp_()),
        moved_bytes(lambda: block.view(25, 40)[:, None].mT),
        moved_bytes(lambda: block.sum()),
        moved_bytes(lambda: block.gather(1, places)),
        moved_bytes(lambda: block.log_softmax(-1)),
    ]
    assert counted == [8_000, 8_000, 0, 4_004, 640 + 320, 8_000]


def test_when_the_time_is_over_the_rest_is_skipped_and_named() -> None:
    found = report("losses", seconds=3.0)
    Race(found, Problem.random(CPU, SHAPE, torch.float32)).run([ours("ours", "kl")])
    assert found.notes == ["losses: ours: skipped, 3 s of the time are left"]
    assert not found.rows and not found.wrong


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (lambda words: subprocess.CompletedProcess(words, -11), "ended with exit code -11"),
        (lambda words: subprocess.TimeoutExpired(words, 1.0), "stopped, the time is over"),
    ],
)
def test_what_a_part_had_found_when_it_died_is_kept(
    end: Callable[[list[str]], Any], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def dies(words: list[str], **kwargs: Any) -> Any:
        part = words[words.index("--only-part") + 1]
        file = Path(words[words.index("--json") + 1])
        if part == "losses":
            found = report(part, file=file)
            found.row(what="first", ms=1.0)
            found.save()
            ending = end(words)
            if isinstance(ending, Exception):
                raise ending
            return ending
        report(part, file=file).save()
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", dies)
    words = ["--device", "cpu", "--quick", "--parts", "losses", "encoding"]
    assert run.main([*words, "--json", str(tmp_path / "found.json")]) == 1
    result = json.loads((tmp_path / "found.json").read_text())
    assert [row["what"] for row in result["rows"]] == ["first"]
    assert result["notes"] == [f"losses: {said}; what it had found is kept"]
    assert "### Losses" in page(result) and said in page(result)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"sees no NVIDIA GPU.* --device cpu --quick"):
        run.run_part("losses", Namespace(device="cuda", json=None, quick=True), 60.0)


def test_the_page_says_what_each_figure_means() -> None:
    text = (REPOSITORY / "docs/measured/gpu.md").read_text()
    before, after = ABOUT.split("{state}")
    assert text.startswith(before) and after in text


@pytest.mark.slow
def test_the_command_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    words = ["--device", "cpu", "--quick", "--seconds", "500"]
    words += ["--json", str(file), "--docs", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu/run.py", *words],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(file.read_text())
    assert {row["part"] for row in result["rows"]} == set(PARTS)
    assert len(result["bars"]) == sum(num_bars for _, num_bars in PARTS.values())
    assert all(bar["ok"] for bar in result["bars"])
    assert result["card"]["torch"] == version("torch")
    assert not (tmp_path / "gpu.md").exists()  # a CPU's times are no page
