"""The whole spine on real parts: text -> vLLM -> shards -> a student, and the real SmolLM2.

Dimensions: T = tokens, P = scored positions, K = kept entries, V = vocabulary.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.state.step_state import progress_of
from schemas.dataset import open_dataset
from schemas.distribution import expectation, unpack_threshold
from stages.models.checkpoints.checkpoint import read_checkpoint
from tests.fixtures.tiny_recipe import finish, make_recipe, start_installed

TRAINING = {
    "stage": "train",
    "student": "student",
    "data": ["documents", "signals"],
    "max_steps": 60,
    "per_device_batch_size": 8,
    "lr": 3e-3,
}
STUDENTS = {
    "student": {"stage": "student_init", "model": "teacher", "layers": [1]},
    "text_only": {**TRAINING, "objective": {"loss": "cross_entropy"}},
    "distilled": {**TRAINING, "objective": {"loss": "kd", "weight": 1.0}},
}


@pytest.mark.vllm
@pytest.mark.slow
def test_a_student_learns_the_teacher_from_shards_that_vllm_wrote(
    tiny_model: Path, paragraphs: list[str], tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, tiny_model, paragraphs[:80], more_steps=STUDENTS)
    settings = ("models.teacher.engine=vllm", "execution.engine.kv_cache_memory_bytes=67108864")
    events = recipe.run(*settings)
    assert set(events.states.values()) == {"pending"}
    steps = {step.name: step for step in recipe.plan(*settings)}
    metrics = {}
    for name in ("text_only", "distilled"):
        record = read_checkpoint(steps[name].folder)
        assert record is not None
        metrics[name] = record.metrics
    before = metrics["distilled"]["before"]["kl_to_teacher"]
    after = {name: metrics[name]["after"]["kl_to_teacher"] for name in metrics}
    assert after["distilled"] < 0.7 * before
    assert after["distilled"] < after["text_only"]  # a random teacher's text says little of it

    again = recipe.run(*settings)
    assert set(again.states.values()) == {"done"} and not again.made
    other = recipe.step("signals")  # the transformers engine is another identity, another folder
    assert other.folder != steps["signals"].folder
    assert progress_of(other).state == "pending"


@pytest.mark.vllm
@pytest.mark.slow
def test_smollm2_through_vllm_says_what_transformers_says(
    smollm2: Path, paragraphs: list[str], tmp_path: Path
) -> None:
    """Rows of the real model against a float32 forward of transformers: values and alignment.

    float32 products in another order differ by some 1e-5; float16 with 7 significant bits allows
    1/128 of a value. The mean over positions has to agree far closer than either.
    """
    recipe = make_recipe(tmp_path, smollm2, paragraphs[:12])
    settings = (
        "models.teacher.engine=vllm",
        "steps.documents.length=128",
        "execution.engine.max_model_len=256",
        "steps.signals.encoding.k=16",
    )
    recipe.run(*settings)
    documents, signals = (recipe.step(name, *settings).folder for name in ("documents", "signals"))
    rows = open_dataset([documents, signals])
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    errors = []
    for index in range(min(len(rows), 6)):
        row = rows[index]
        ids_T = torch.from_numpy(row["input_ids_T"].astype(np.int64))
        with torch.no_grad():
            logprobs_PV = model(ids_T[None]).logits[0, :-1].double().log_softmax(-1).numpy()
        next_P = np.take_along_axis(logprobs_PV, ids_T[1:, None].numpy(), 1)[:, 0]
        entropies_P = -(np.exp(logprobs_PV) * logprobs_PV).sum(axis=1)
        np.testing.assert_allclose(row["next_token_logprobs_P"], next_P, rtol=1 / 120, atol=2e-3)
        np.testing.assert_allclose(row["entropies_P"], entropies_P, rtol=1 / 120, atol=2e-3)
        weights_PK = unpack_threshold(row["token_ids_PK"], row["num_head_P"], row["head_codes_E"])
        kept_P = -expectation(row["token_ids_PK"], weights_PK, logprobs_PV)
        errors.append(kept_P - entropies_P)
    error_P = np.concatenate(errors)
    assert abs(error_P.mean()) < 4 * error_P.std() / math.sqrt(len(error_P))
    assert error_P.std() < 0.5


@pytest.mark.vllm
@pytest.mark.slow
def test_a_run_says_that_vllm_starts_and_shows_no_lines_of_others(
    tiny_model: Path, paragraphs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("VLLM_LOGGING_LEVEL", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.delenv(variable, raising=False)
    recipe = make_recipe(tmp_path, tiny_model, paragraphs[:4])
    settings = ("models.teacher.engine=vllm", "execution.engine.kv_cache_memory_bytes=67108864")
    overrides = [part for setting in settings for part in ("--set", setting)]
    said = finish(start_installed("run", recipe.path, *overrides))
    assert said.code == 0 and said.err == "", said
    lines = said.out.splitlines()
    (at,) = (
        i for i, line in enumerate(lines) if line == f"[signals] starting vLLM on {tiny_model}"
    )
    assert lines[at - 1].startswith("[signals] teacher_logits: ")
    assert "Triton" not in said.out and "NUMA" not in said.out
