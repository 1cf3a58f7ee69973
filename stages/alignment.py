"""The work of ``teacher_align``: TRL's DPOTrainer on the very token ids of a table of pairs.

DPO (arXiv 2305.18290). TRL tokenises text, adds an EOS and cuts to a length of its own; what it is
given here has its ids already, so all three are switched off, and the aligned teacher has seen the
sequences that it will score. The reference is the model before the first step; its log-probs are
made beforehand, by us. Weights are float32.

A run that was killed starts over: TRL's is short beside what it is for. What is left in the folder
counts as finished only with its ``checkpoint.json``; a half-written model is told from somebody's
own by the ``run.json`` beside it.

Dimensions: B = pairs.
"""

import copy
import json
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from schemas.dataset import CachedDataset, open_dataset
from schemas.errors import ConfigError, StoreError, TeacherCacheError
from schemas.storage.files import Folder, write_text
from schemas.tables.preference_pairs import PREFERENCE_PAIRS
from stages.checkpoint import (
    CHECKPOINT,
    CHECKPOINTS,
    RUN,
    CheckpointRecord,
    claim_folder,
    read_checkpoint,
    run_fingerprint,
    weight_checksums,
    write_checkpoint,
)
from stages.student.preference_metrics import implicit_rewards, preference
from stages.student.response_measures import response_logprobs
from stages.student.sequence_logprobs import Continuations
from stages.student.student_model import check_student, load_student, student_vocab_size
from stages.teacher_align import AlignConfig
from stages.tokenizer_identity import copy_tokenizer

F64Array = npt.NDArray[np.float64]
OnEvent = Callable[[dict[str, Any]], None]
_SCORED_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class AlignResult:
    """``metrics`` of the held-out pairs (empty without any) and of the run."""

    output: Path
    fingerprint: str
    metrics: Mapping[str, Mapping[str, float]]


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
    trained, summary = _train(config, loaded, dataset, scratch, on_event)
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


def _train(
    config: AlignConfig,
    model: PreTrainedModel,
    dataset: CachedDataset,
    scratch: Path,
    on_event: OnEvent | None,
) -> tuple[PreTrainedModel, dict[str, float]]:
    """Return the trained model, an adapter merged, and the run's numbers."""
    trl, lora = _libraries(config)
    rows = [dataset[index] for index in range(len(dataset))]
    trainer = pair_trainer(trl)(
        model=model,
        args=_arguments(trl, config, scratch),
        train_dataset=as_token_ids(rows, _logprobs(model, rows)),
        processing_class=_tokenizer(model),
        peft_config=lora,
        callbacks=[_Reporter(on_event)] if on_event else None,
    )
    trainer.remove_callback(PrinterCallback)
    output = trainer.train()
    trained = trainer.model
    if lora is not None:
        trained = trained.merge_and_unload()
    summary = {"steps": float(output.global_step), "loss": float(output.training_loss)}
    return trained, summary


def _libraries(config: AlignConfig) -> tuple[Any, Any]:
    """Return TRL, and the adapter's configuration where one is asked for."""
    try:
        with warnings.catch_warnings(action="ignore"):
            import trl  # an extra, and seconds to load
    except ImportError as error:
        raise ConfigError(
            f"aligning a teacher needs TRL ({error}): install teachercache[align]"
        ) from error
    if config.lora_rank is None:
        return trl, None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError(
            f"lora_rank needs PEFT ({error}): install teachercache[align], or leave it out"
        ) from error
    rank = config.lora_rank
    return trl, LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def pair_trainer(trl: Any) -> Any:
    """Return a DPOTrainer that takes rows of ``as_token_ids`` as they are."""

    class PairTrainer(trl.DPOTrainer):  # type: ignore[misc]  # TRL is untyped
        """Tokenising, an EOS and a length of its own are left out, as is a reference."""

        def _prepare_dataset(self, dataset: Any, *arguments: Any, **settings: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *arguments: Any, **settings: Any) -> Any:
            return dataset

    return PairTrainer


def as_token_ids(rows: Sequence[Mapping[str, Any]], reference_B2: F64Array) -> Any:
    """Return the rows as TRL's collator reads them: token ids, and the reference's log-probs."""
    from datasets import Dataset

    names = {"prompt_ids": "prompt_ids_T", "chosen_ids": "chosen_ids_C"}
    names["rejected_ids"] = "rejected_ids_R"
    columns = {name: [row[column].tolist() for row in rows] for name, column in names.items()}
    scores = {"ref_chosen_logps": reference_B2[:, 0], "ref_rejected_logps": reference_B2[:, 1]}
    return Dataset.from_dict(columns | {name: values.tolist() for name, values in scores.items()})


def _tokenizer(model: PreTrainedModel) -> Any:
    """TRL reads the padding id off it, and nothing else where ids are given."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.name_or_path, local_files_only=True)


def _arguments(trl: Any, config: AlignConfig, scratch: Path) -> Any:
    args = trl.DPOConfig(
        output_dir=str(scratch),
        beta=config.beta,
        learning_rate=config.lr,
        max_steps=config.max_steps or -1,
        num_train_epochs=config.epochs or 1.0,
        per_device_train_batch_size=config.per_device_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        warmup_steps=config.warmup,
        max_length=None,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        data_seed=config.seed,
        save_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide a loss that is not a number
        report_to="none",
        disable_tqdm=True,
    )
    if args.n_gpu > 1:
        args._n_gpu = 1  # TRL refuses DataParallel, which the Trainer would choose
    return args


class _Reporter(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Turns TRL's logs into the events that our own trainer gives."""

    def __init__(self, on_event: OnEvent) -> None:
        self.on_event = on_event
        self.clock = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock = time.monotonic()
        self.on_event({"event": "start", "step": 0, "max_steps": state.max_steps})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            now = time.monotonic()
            pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps
            speed = {"samples_per_s": pairs / max(now - self.clock, 1e-9)}
            self.clock = now
            place = {"event": "step", "step": state.global_step, "max_steps": state.max_steps}
            self.on_event(place | {"loss": logs["loss"]} | speed)


def _save(model: PreTrainedModel, source: Path, output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(output)
        copy_tokenizer(source, output)
    except OSError as error:
        raise StoreError(f"cannot write the aligned teacher to {output}: {error}") from error
