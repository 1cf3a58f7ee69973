"""Aligning a teacher: TRL is given the table's own ids, and what it made is a teacher like any."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from schemas.dataset import open_dataset
from schemas.errors import ConfigError, IdentityMismatch, StoreError, TeacherCacheError
from stages.models.checkpoints.checkpoint import read_checkpoint
from stages.models.checkpoints.tokenizer_identity import tokenizer_fingerprint
from stages.teacher import trl_trainer
from stages.teacher.stage import AlignConfig
from stages.teacher.trl_trainer import as_token_ids, pair_trainer
from stages.teacher.work import align, preference_metrics
from tests.fixtures.preference_data import (
    PreferenceData,
    gathered,
    make_pairs,
    make_preference_data,
    response_logprobs,
    sides_of,
    wide_model,
)
from tests.fixtures.tiny_recipe import COMMAND, teachercache

CONFIG = AlignConfig(beta=0.2, lr=2e-3, max_steps=12, per_device_batch_size=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreferenceData:
    return make_preference_data(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def aligned(data: PreferenceData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("aligned") / "teacher"
    align(CONFIG, model=data.reference, pairs=data.pairs, output=output)
    return output


def test_trl_trains_on_the_ids_of_the_table(data: PreferenceData, tmp_path: Path) -> None:
    """One batch as TRL's own collator makes it: nothing added, nothing cut, prompts masked."""
    import trl

    dataset = open_dataset([data.pairs], split="train")
    rows = [dataset[index] for index in range(len(dataset))]
    scores_B2: Any = np.arange(2.0 * len(rows)).reshape(-1, 2)
    args = trl.DPOConfig(
        output_dir=str(tmp_path),
        max_length=None,
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=3,
        precompute_ref_log_probs=True,
    )
    trainer = pair_trainer(trl)(
        model=AutoModelForCausalLM.from_pretrained(data.reference),
        args=args,
        train_dataset=as_token_ids(rows, scores_B2),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    pairs = {tuple(pair.prompt_ids_T.tolist()): pair for pair in make_pairs()}
    place = {row["sample_id"]: index for index, row in enumerate(rows)}
    masks = batch["attention_mask"].bool(), batch["completion_mask"].bool()
    assert len(batch["input_ids"]) == 6
    for row in range(6):
        ids = batch["input_ids"][row][masks[0][row]].tolist()
        response = batch["input_ids"][row][masks[1][row]].tolist()
        pair = pairs[tuple(ids[: len(ids) - len(response)])]
        assert response == sides_of(pair)[row // 3].tolist()
        score = batch[("ref_chosen_logps", "ref_rejected_logps")[row // 3]][row % 3]
        assert float(score) == scores_B2[place[pair.sample_id], row // 3]


def test_the_aligned_teacher_prefers_what_was_chosen(data: PreferenceData, aligned: Path) -> None:
    record = read_checkpoint(aligned)
    assert record is not None
    models = wide_model(aligned), wide_model(data.reference)
    rewards: dict[str, list[float]] = {"train": [], "heldout": []}
    with torch.no_grad():
        for pair in make_pairs():
            ratios = []
            for side in sides_of(pair):
                ours, theirs = (
                    float(gathered(response_logprobs(m, pair.prompt_ids_T, side), side).sum())
                    for m in models
                )
                ratios.append(CONFIG.beta * (ours - theirs))
            rewards[pair.split].append(ratios[0] - ratios[1])
    assert np.mean(rewards["train"]) > 0.2
    found = record.metrics["heldout"]
    assert found["pairs"] == len(rewards["heldout"]) == 4
    assert found["margin"] == pytest.approx(np.mean(rewards["heldout"]), abs=1e-4)
    assert found["accuracy"] == np.mean([margin > 0 for margin in rewards["heldout"]])
    assert record.metrics["train"]["steps"] == 12


def test_it_is_an_ordinary_folder_with_the_same_tokenizer(
    data: PreferenceData, aligned: Path
) -> None:
    assert tokenizer_fingerprint(aligned) == tokenizer_fingerprint(data.reference)
    config = json.loads((aligned / "config.json").read_text())
    before = json.loads((data.reference / "config.json").read_text())
    noise = ("transformers_version", "dtype")
    assert {k: v for k, v in config.items() if k not in noise} == {
        k: v for k, v in before.items() if k not in noise
    }
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (aligned / name).read_bytes() == (data.reference / name).read_bytes(), name
    assert not [path for path in aligned.iterdir() if path.is_dir()]
    modes = {path.name: path.stat().st_mode for path in aligned.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]  # not the weights' owner alone


@pytest.mark.slow
def test_equal_runs_give_equal_weights_and_a_finished_one_is_kept(
    data: PreferenceData, aligned: Path, tmp_path: Path
) -> None:
    again = align(CONFIG, model=data.reference, pairs=data.pairs, output=tmp_path / "again")
    name = "model.safetensors"
    assert (again.output / name).read_bytes() == (aligned / name).read_bytes()
    before = (aligned / name).stat().st_mtime_ns
    kept = align(CONFIG, model=data.reference, pairs=data.pairs, output=aligned)
    assert kept.metrics == again.metrics and (aligned / name).stat().st_mtime_ns == before
    other = CONFIG.model_copy(update={"beta": 0.3})
    with pytest.raises(ConfigError, match="holds training"):
        align(other, model=data.reference, pairs=data.pairs, output=aligned)


@pytest.mark.slow
def test_a_run_is_known_by_weights_and_not_by_where_they_lie(
    data: PreferenceData, aligned: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(data.reference, tmp_path / "model")
    stamp = (aligned / "model.safetensors").stat().st_mtime_ns
    align(CONFIG, model=model, pairs=data.pairs, output=aligned)
    assert (aligned / "model.safetensors").stat().st_mtime_ns == stamp
    retrained: Any = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        next(retrained.parameters()).mul_(1.5)
    retrained.save_pretrained(model)
    with pytest.raises(ConfigError, match="holds training"):
        align(CONFIG, model=model, pairs=data.pairs, output=aligned)


@pytest.mark.slow
def test_a_model_in_the_way_is_kept_and_a_half_written_run_is_not(
    data: PreferenceData, aligned: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(data.reference, tmp_path / "model")
    weights = (model / "model.safetensors").read_bytes()
    for start in (model, data.reference):
        with pytest.raises(ConfigError, match="model already holds another model: choose another"):
            align(CONFIG, model=start, pairs=data.pairs, output=model)
    assert (model / "model.safetensors").read_bytes() == weights
    output = tmp_path / "out"

    (output / "tokenizer.json").mkdir(parents=True)  # cannot be written over: stops it half-way
    with pytest.raises(StoreError, match=r"cannot write the aligned teacher to .*out: .*directory"):
        align(CONFIG, model=data.reference, pairs=data.pairs, output=output)
    (output / "tokenizer.json").rmdir()
    assert (output / "config.json").is_file() and read_checkpoint(output) is None
    align(CONFIG, model=data.reference, pairs=data.pairs, output=output)
    name = "model.safetensors"
    assert (output / name).read_bytes() == (aligned / name).read_bytes()


@pytest.mark.slow
def test_a_run_that_diverges_leaves_no_teacher(data: PreferenceData, tmp_path: Path) -> None:
    output = tmp_path / "out"
    wild = CONFIG.model_copy(update={"lr": 1e30})
    with pytest.raises(TeacherCacheError, match=r"diverged.*: lower lr \(1e\+30\)"):
        align(wild, model=data.reference, pairs=data.pairs, output=output)
    assert not list(output.rglob("*.safetensors"))
    align(CONFIG, model=data.reference, pairs=data.pairs, output=output)


@pytest.mark.slow
def test_a_run_of_one_step_is_not_all_warm_up(data: PreferenceData, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_steps": 1})
    found = align(config, model=data.reference, pairs=data.pairs, output=tmp_path / "out")
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (data.reference, found.output)
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)
    import trl

    args = trl_trainer.dpo_arguments(trl, CONFIG, tmp_path)
    for steps in range(2, 200):  # longer runs are as they were
        assert args.get_warmup_steps(steps) == math.ceil(steps * CONFIG.warmup)


def test_several_gpus_do_not_make_it_data_parallel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL refuses more than one a process; the Trainer would take all that it sees."""
    import trl

    monkeypatch.setattr(trl.DPOConfig, "n_gpu", property(lambda args: args._n_gpu))

    def eight(args: Any) -> torch.device:
        args._n_gpu = 8
        return torch.device("cpu")

    monkeypatch.setattr(trl.DPOConfig, "_setup_devices", property(eight))
    args = trl_trainer.dpo_arguments(trl, CONFIG, tmp_path)
    assert args.n_gpu == 1


@pytest.mark.slow
def test_an_adapter_is_merged_into_an_ordinary_folder(data: PreferenceData, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"lora_rank": 4, "lr": 2e-2})
    found = align(config, model=data.reference, pairs=data.pairs, output=tmp_path / "out")
    assert not list(found.output.glob("adapter*"))
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (data.reference, found.output)
    )
    assert set(before) == set(after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("_proj" in name for name in moved)


def test_preference_metrics_of_a_worked_example() -> None:
    aligned_B2 = np.array([[-3.0, -5.0], [-2.0, -1.0], [-4.0, -4.0]])
    reference_B2 = np.array([[-4.0, -5.0], [-2.0, -2.0], [-5.0, -5.0]])
    found = preference_metrics(aligned_B2, reference_B2, beta=0.5)
    assert found == {
        "pairs": 3.0,
        "accuracy": pytest.approx(1 / 3),  # a tie prefers nothing
        "margin": pytest.approx(0.0),
        "chosen_reward": pytest.approx(0.5 * 2 / 3),
        "rejected_reward": pytest.approx(0.5 * 2 / 3),
    }
    assert preference_metrics(np.zeros((0, 2)), np.zeros((0, 2)), beta=0.5) == {}


def test_what_cannot_be_aligned_is_one_line(data: PreferenceData, tmp_path: Path) -> None:
    table = data.root / "responses"
    with pytest.raises(ConfigError, match="is table responses, expected preference_pairs"):
        align(CONFIG, model=data.reference, pairs=table, output=tmp_path / "out")
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(data.reference).save_pretrained(other)
    for path in data.reference.glob("tokenizer*"):
        (other / path.name).write_text(path.read_text().replace('"w1":1', '"w1":2'))
    body = json.loads((other / "tokenizer.json").read_text())
    body["model"]["vocab"] |= {"w1": 2, "w2": 1}
    (other / "tokenizer.json").write_text(json.dumps(body))
    with pytest.raises(IdentityMismatch, match="has tokenizer"):
        align(CONFIG, model=other, pairs=data.pairs, output=tmp_path / "out")


@pytest.mark.parametrize(("name", "value"), [("beta", "0"), ("lr", "-1"), ("lr", "nan")])
def test_a_number_that_cannot_be_is_one_line(
    data: PreferenceData, tmp_path: Path, name: str, value: str
) -> None:
    said = teachercache(
        *("teacher", "align", "--from", data.reference, "--pairs", data.pairs),
        *(f"--{name}", value, tmp_path / "out"),
    )
    assert said.code == 2
    assert said.err.strip() == f"error: --{name} is {value}, expected a number above 0"


@pytest.mark.slow
def test_the_command_prints_held_out_numbers(data: PreferenceData, tmp_path: Path) -> None:
    said = teachercache(
        *("teacher", "align", "--from", data.reference, "--pairs", data.pairs),
        *("--steps", "2", "--batch-size", "4", "--beta", "0.2", tmp_path / "out"),
    )
    assert said.code == 0, said.err
    body = json.loads(said.out[said.out.index("{") :])
    assert body["heldout"]["pairs"] == 4.0 and body["train"]["steps"] == 2.0


@pytest.mark.slow
def test_a_missing_trl_is_named_with_the_extra_to_install(
    data: PreferenceData, tmp_path: Path
) -> None:
    (tmp_path / "trl.py").write_text("raise ImportError('no trl here')")
    done: Any = subprocess.run(
        [
            *(sys.executable, str(COMMAND), "teacher", "align", "--from", str(data.reference)),
            *("--pairs", str(data.pairs), str(tmp_path / "out")),
        ],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin", "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 2
    assert "aligning a teacher needs TRL (no trl here): install teachercache[align]" in done.stderr
