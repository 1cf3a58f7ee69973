"""The work of ``teacher_align``: DPO on the very token ids of a table of pairs, by TRL.

DPO (arXiv 2305.18290). The reference is the model before the first step; its log-probs are made
beforehand, by us. Weights are float32.

A run that was killed starts over: TRL's is short beside what it is for. What is left in the folder
counts as finished only with its ``checkpoint.json``; a half-written model is told from somebody's
own by the ``run.json`` beside it.

Dimensions: B = pairs.
"""

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from schemas.dataset import CachedDataset, open_dataset
from schemas.errors import ConfigError, StoreError, TeacherCacheError
from schemas.storage.files import Folder, write_text
from schemas.tables.preference_pairs import PREFERENCE_PAIRS
from stages.models.causal_lm.implicit_rewards import implicit_rewards, preference
from stages.models.causal_lm.model import check_student, load_student, student_vocab_size
from stages.models.causal_lm.response_measures import response_logprobs
from stages.models.causal_lm.sequence_logprobs import Continuations
from stages.models.checkpoints.checkpoint import (
    CHECKPOINT,
    CHECKPOINTS,
    RUN,
    CheckpointRecord,
    claim_folder,
    equal_modes,
    read_checkpoint,
    run_fingerprint,
    weight_checksums,
    write_checkpoint,
)
from stages.models.checkpoints.tokenizer_identity import copy_tokenizer
from stages.stage import StepJob
from stages.teacher.stage import AlignConfig, TeacherAlignStage
from stages.teacher.trl_trainer import train_on_pairs

F64Array = npt.NDArray[np.float64]
OnEvent = Callable[[dict[str, Any]], None]
_SCORED_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class AlignResult:
    """``metrics`` of the held-out pairs (empty without any) and of the run."""

    output: Path
    fingerprint: str
    metrics: Mapping[str, Mapping[str, float]]


def make(stage: TeacherAlignStage, job: StepJob) -> None:
    """Align the teacher of a step."""
    align(
        stage,
        model=job.models[stage.model].path,
        pairs=job.tables[0],
        output=job.output,
        fingerprint=job.fingerprint,
        identity=job.identity,
        on_event=job.trained,
    )


def align(
    config: AlignConfig,
    *,
    model: Path,
    pairs: Folder,
    output: Path,
    fingerprint: str = "",
    identity: Mapping[str, Any] | None = None,
    on_event: OnEvent | None = None,
) -> AlignResult:
    """Align ``model`` on the train rows of ``pairs`` into ``output``, a transformers folder.

    A folder that holds this run, finished, is returned as it is. Raises ConfigError where TRL is
    not installed, for a table of another kind and a folder of another run or model,
    IdentityMismatch for a model of another tokenizer, TeacherCacheError for a run that diverged.
    """
    dataset = open_dataset([pairs], split="train")
    if dataset.manifests[0].table != PREFERENCE_PAIRS.name:
        raise ConfigError(
            f"{pairs} is table {dataset.manifests[0].table}, expected {PREFERENCE_PAIRS.name}"
        )
    identity = identity or {
        "config": config.model_dump(mode="json", include=set(AlignConfig.model_fields)),
        "data": dataset.manifests[0].dataset_id,
        "model": weight_checksums(model),
    }
    fingerprint = fingerprint or run_fingerprint(identity)
    claim_folder(output, fingerprint, resume=True)
    finished = read_checkpoint(output)
    if finished is not None:
        return AlignResult(output, fingerprint, finished.metrics)
    _refuse_model(output)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_student(model, device=device)
    check_student(model, dataset, student_vocab_size(loaded))
    held_out = _held_out(pairs, dataset)
    before = _logprobs(loaded, held_out)
    configs = copy.deepcopy((loaded.config, loaded.generation_config))
    scratch = output / CHECKPOINTS
    shutil.rmtree(scratch, ignore_errors=True)
    rows = [dataset[index] for index in range(len(dataset))]
    reference_B2 = _logprobs(loaded, rows)
    trained, summary = train_on_pairs(
        config, loaded, rows, reference_B2, scratch=scratch, on_event=on_event
    )
    trained.config, trained.generation_config = configs  # TRL names a padding token, no cache
    after = _logprobs(trained, held_out)
    _refuse_divergence(config, trained, after)
    metrics = {"heldout": preference_metrics(after, before, beta=config.beta), "train": summary}
    write_text(scratch / RUN, json.dumps({"fingerprint": fingerprint}) + "\n")
    _save(trained, model, output)
    record = CheckpointRecord(fingerprint=fingerprint, identity=identity, metrics=metrics)
    write_checkpoint(output, record)
    shutil.rmtree(scratch, ignore_errors=True)
    return AlignResult(output, fingerprint, metrics)


def _refuse_model(output: Path) -> None:
    """Raise ConfigError for a model that no run of ours began to write, the one to align, say."""
    ours = (output / CHECKPOINT).is_file() or (output / CHECKPOINTS / RUN).is_file()
    if (output / "config.json").is_file() and not ours:
        raise ConfigError(
            f"{output} already holds another model: choose another folder for the aligned teacher, "
            f"or remove it"
        )


def _refuse_divergence(config: AlignConfig, model: PreTrainedModel, after_B2: F64Array) -> None:
    finite = all(bool(torch.isfinite(weight).all()) for weight in model.parameters())
    if not finite or not np.isfinite(after_B2).all():
        raise TeacherCacheError(
            f"the alignment diverged, weights or held-out log-probs are not finite: lower lr "
            f"({config.lr:g})"
        )


def _held_out(pairs: Folder, dataset: CachedDataset) -> list[Mapping[str, Any]]:
    if not any(
        shard.split == "heldout" and shard.num_rows for shard in dataset.manifests[0].shards
    ):
        return []
    rows = open_dataset([pairs], split="heldout", verify=False)
    return [rows[index] for index in range(len(rows))]


def _logprobs(model: PreTrainedModel, rows: Sequence[Mapping[str, Any]]) -> F64Array:
    """Return [B, 2] sums of log p of chosen and rejected, nats."""
    if not rows:
        return np.zeros((0, 2))
    asked = [
        Continuations.of(row["prompt_ids_T"], (row["chosen_ids_C"], row["rejected_ids_R"]))
        for row in rows
    ]
    training = model.training
    model.eval()
    with torch.inference_mode():
        found = response_logprobs(model, asked, batch_size=_SCORED_AT_ONCE)
    model.train(training)
    return np.stack(found)


def preference_metrics(
    aligned_B2: F64Array, reference_B2: F64Array, *, beta: float
) -> dict[str, float]:
    """Return how far the implicit reward ``beta log(aligned / reference)`` prefers the chosen.

    ``accuracy`` is the share of pairs with a margin above 0, ``margin`` the mean; empty without
    pairs.
    """
    if not len(aligned_B2):
        return {}
    rewards_B2 = implicit_rewards(aligned_B2, reference_B2, beta)
    found = preference(*rewards_B2.T)
    return {
        "pairs": float(len(rewards_B2)),
        "accuracy": found.accuracy,
        "margin": found.margin,
        "chosen_reward": float(rewards_B2[:, 0].mean()),
        "rejected_reward": float(rewards_B2[:, 1].mean()),
    }


def _save(model: PreTrainedModel, source: Path, output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(output)
        copy_tokenizer(source, output)
        equal_modes(output)
    except OSError as error:
        raise StoreError(f"cannot write the aligned teacher to {output}: {error}") from error
