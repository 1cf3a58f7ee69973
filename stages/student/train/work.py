"""Train a student on cached signals, from a model folder to a model folder.

``output`` becomes an ordinary transformers folder with the student's tokenizer, ``metrics.json``
and, last of all, ``checkpoint.json``: a folder without it is unfinished. A run that was killed goes
on from its last whole checkpoint with the losses it would have had. No teacher is loaded here and
no engine is imported.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerState

from schemas.dataset import CachedDataset, open_dataset
from schemas.errors import ConfigError, RejectLimitError, StoreError
from schemas.storage.files import Folder, write_text
from stages.models.checkpoints.checkpoint import (
    CHECKPOINTS,
    METRICS,
    RUN,
    CheckpointRecord,
    claim_folder,
    equal_modes,
    last_checkpoint,
    read_checkpoint,
    run_fingerprint,
    weight_checksums,
    write_checkpoint,
)
from stages.models.checkpoints.tokenizer_identity import copy_tokenizer, num_token_ids
from stages.student.batches.several_datasets import open_data_sets
from stages.student.batches.signals import worker_errors_as_raised
from stages.student.batches.training_data import teacher_heads_of
from stages.student.evaluate.positions import HeldOut, measure_student
from stages.student.objectives.mend import MendConfig
from stages.student.objectives.objective import TableKind
from stages.student.options import TrainOptions
from stages.student.train.arguments import training_arguments
from stages.student.train.distillation_trainer import DistillationTrainer, OnCheckpoint, OnEvent
from stages.student.train.early_stopping import EarlyStop, is_of_numbers, require_heldout
from stages.student.train.loading import Start, load_start
from stages.student.train.loss_log import speeds_of, without_speeds
from stages.student.train.sharding import (
    own_part,
    require_same_sharding,
    reshard,
    whole_weights,
)
from stages.student.train.stage import TrainConfig
from stages.student.train.trackers import Trackers

__all__ = ["DistillationTrainer", "TrainResult", "train"]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """``metrics`` has ``before`` and ``after`` (held-out means, empty without) and ``train``.

    ``history`` is what was logged: step, loss, its parts and the learning rate.
    """

    output: Path
    fingerprint: str
    metrics: Mapping[str, Mapping[str, float]]
    history: tuple[Mapping[str, float], ...]


def train(
    config: TrainConfig,
    *,
    student: Path,
    data: Sequence[Folder],
    lm_data: Sequence[Folder] = (),
    reader: Path | None = None,
    adapter: Path | None = None,
    output: Path,
    fingerprint: str = "",
    resume: bool = True,
    heldout: bool = True,
    options: TrainOptions | None = None,
    on_event: OnEvent | None = None,
    on_checkpoint: OnCheckpoint | None = None,
) -> TrainResult:
    """Train ``student`` on the joined rows of the tables in ``data``; see the module.

    ``on_checkpoint`` is called, in the main process, with each checkpoint that can be gone on from.
    ``lm_data`` are tables of running text, for the LM part of ``icl_distillation`` alone. With an
    objective that uses a ``reader``, ``student`` is a distiller's folder. With ``config.lora`` the
    output is an adapter on ``student``, begun from an earlier one where ``adapter`` names it.
    ``fingerprint`` names the run; without one it is the hash of config, data and student. A folder
    that already holds this run is returned as it is. Raises ConfigError for a folder that holds
    another, IdentityMismatch for a student of another tokenizer or too small a vocabulary, and
    what ``open_dataset`` raises.
    """
    options = options or TrainOptions()
    opened = open_data_sets if config.objective.SEVERAL else open_dataset
    dataset = opened(data, split="train", verify=options.verify)
    lm_dataset = None
    if lm_data:
        lm_dataset = open_dataset(lm_data, split="train", verify=options.verify)
    config.objective.require(_kinds(dataset), _kinds(lm_dataset))
    for own in dataset.data_sets:
        _require_partners(own, config)
    assert (reader is not None) == config.objective.USES_READER, "a reader where one is used"
    identity = _identity(config, dataset, lm_dataset, student)
    if reader is not None:
        identity["reader"] = weight_checksums(reader)
    if adapter is not None:
        identity["adapter"] = weight_checksums(adapter)
    fingerprint = fingerprint or run_fingerprint(identity)
    run = _Run(config, options, output, fingerprint, identity, on_event, on_checkpoint)
    claim_folder(output, fingerprint, resume=resume)
    finished = read_checkpoint(output)
    if finished is not None and resume:
        return TrainResult(output, fingerprint, finished.metrics, finished.history)
    told = compress(data, (m.table not in config.objective.selects for m in dataset.manifests))
    held_out = opened([*told], split="heldout", verify=False) if heldout else None
    folders = Start(student, reader, adapter)
    return run.carry_out(folders, dataset, lm_dataset, held_out, resume=resume)


def _require_partners(dataset: CachedDataset, config: TrainConfig) -> None:
    """Refuse tables of which too few rows belong together: they are of other inputs, mostly."""
    missing, rows = dataset.num_missing, dataset.num_missing + len(dataset)
    rejected = sum(sum(manifest.rejects.values()) for manifest in dataset.manifests[1:])
    if missing - rejected > config.max_missing_fraction * rows:
        others = ", ".join(map(str, dataset.folders[1:]))
        raise RejectLimitError(
            f"{missing} of {rows} train rows of {dataset.folders[0]} have no row in each of "
            f"{others}, which rejected {rejected}: more than max_missing_fraction "
            f"({config.max_missing_fraction:g}) allows; name tables that were made of one another, "
            f"or raise it"
        )


def _require_finite(model: PreTrainedModel, config: TrainConfig) -> None:
    """Refuse weights that a last step has broken: no loss after it shows them."""
    for name, weight in model.named_parameters():
        if not bool(own_part(weight).isfinite().all()):
            raise ConfigError(
                f"after the last step {name} holds numbers that are not finite: lower lr "
                f"({config.lr:g}) or max_grad_norm ({config.max_grad_norm:g})"
            )


def _kinds(dataset: CachedDataset | None) -> list[TableKind]:
    return [(manifest.table, manifest.variant) for manifest in dataset.manifests] if dataset else []


def _identity(
    config: TrainConfig, dataset: CachedDataset, lm_dataset: CachedDataset | None, student: Path
) -> dict[str, Any]:
    """What makes a run's weights what they are; step names and places do not."""
    identity = {
        "config": config.settings(),
        "data": [manifest.dataset_id for manifest in dataset.manifests],
        "student": weight_checksums(student),
    }
    if lm_dataset is not None:
        identity["lm_data"] = [manifest.dataset_id for manifest in lm_dataset.manifests]
    return identity


@dataclass(frozen=True, slots=True)
class _Run:
    """One run from start to finish; in DDP every process makes the same one."""

    config: TrainConfig
    options: TrainOptions
    output: Path
    fingerprint: str
    identity: Mapping[str, Any]
    on_event: OnEvent | None
    on_checkpoint: OnCheckpoint | None

    @property
    def checkpoints(self) -> Path:
        return self.output / CHECKPOINTS

    def carry_out(
        self,
        folders: Start,
        dataset: CachedDataset,
        lm_dataset: CachedDataset | None,
        held_out: CachedDataset | None,
        *,
        resume: bool,
    ) -> TrainResult:
        """Measure, train, measure again, save."""
        args = training_arguments(self.config, self.options, self.checkpoints)
        if self.on_event is not None and dataset.num_missing and args.process_index == 0:
            self.on_event({"event": "rows", "rows": len(dataset), "missing": dataset.num_missing})
        read = [dataset] if lm_dataset is None else [dataset, lm_dataset]
        divided = self.options.sharding == "full"
        # What does not fit on one device is loaded beside it.
        device = torch.device("cpu") if divided else args.device
        model, reader = load_start(folders, self.config, read, device)
        known_ids = num_token_ids(folders.student)
        teacher_heads = teacher_heads_of(dataset, args.device, known_ids)
        teacher_head = next(iter(teacher_heads.values()), None)
        scored = None
        if held_out is not None:
            place = (args.process_index, args.world_size, known_ids, reader)
            scored = HeldOut(held_out, teacher_head, self.options, self.config.dtype, *place)
            mixture = getattr(self.config.objective, "mixture", None)
            scored = replace(scored, together=divided, teacher_heads=teacher_heads, mixture=mixture)
        before = {} if divided else self._measure(model, scored, "before")
        trackers = None
        if self.options.report_to:
            trackers = Trackers(self.options, self.output, before)
        early_stop = self._early_stop(scored)
        use_cache = getattr(model.config, "use_cache", None)
        trainer = DistillationTrainer(
            model,
            args,
            dataset=dataset,
            config=self.config,
            teacher_head=teacher_head,
            on_event=self.on_event,
            lm_dataset=lm_dataset,
            micro_batch_tokens=self.options.micro_batch_tokens,
            on_checkpoint=self.on_checkpoint,
            num_token_ids=known_ids,
            reader=reader,
            trackers=trackers,
            early_stop=early_stop,
            on_divided=lambda: before.update(self._measure(model, scored, "before")),
            teacher_heads=teacher_heads,
        )
        if trainer.is_world_process_zero():
            self._prepare_folder(resume=resume)
            if early_stop is not None:
                early_stop.take_from(last_checkpoint(self.checkpoints))
        trainer.accelerator.wait_for_everyone()
        last = last_checkpoint(self.checkpoints)
        require_same_sharding(last, self.options.sharding)
        summary = self._train(trainer, last, early_stop)
        if use_cache is not None:
            model.config.use_cache = use_cache  # the Trainer turns it off
        _require_finite(model, self.config)
        summary["rows_without_partner"] = float(dataset.num_missing)
        if isinstance(self.config.objective, MendConfig):
            summary["cross_model"] = float(self.config.objective.cross_model)
        after = self._measure(model, scored, "after")
        if trackers is not None and trainer.is_world_process_zero():
            trackers.finish(args, trainer.state, trainer.control, after)
        metrics = {"before": before, "after": after, "train": summary}
        logged = [entry for entry in trainer.state.log_history if is_of_numbers(entry)]
        history = tuple(without_speeds(entry) for entry in logged)
        speeds = [found for entry in logged if (found := speeds_of(entry))]
        weights = whole_weights(model, trainer) if divided else None
        if trainer.is_world_process_zero():
            self._save(model, folders.student, metrics, (history, speeds), weights)
        trainer.accelerator.wait_for_everyone()
        return TrainResult(self.output, self.fingerprint, metrics, history)

    def _prepare_folder(self, *, resume: bool) -> None:
        """Keep the checkpoints of this run, or start over."""
        if not resume and self.output.is_dir():
            (self.output / "checkpoint.json").unlink(missing_ok=True)
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        body = {"fingerprint": self.fingerprint, "identity": self.identity}
        write_text(self.checkpoints / RUN, json.dumps(body, indent=1, sort_keys=True) + "\n")

    def _early_stop(self, scored: HeldOut | None) -> EarlyStop | None:
        if self.config.early_stopping is None:
            return None
        require_heldout(0 if scored is None else len(scored.dataset))

        def measure(model: PreTrainedModel) -> dict[str, float]:
            return self._measure(model, scored, "held out")

        return EarlyStop(self.config.early_stopping, self.checkpoints, measure)

    def _train(
        self, trainer: DistillationTrainer, checkpoint: Path | None, early_stop: EarlyStop | None
    ) -> dict[str, float]:
        """Train to the end, or to where it stops; then the best weights are the model's."""
        started = time.monotonic()
        steps, over = 0, False
        if early_stop is not None and checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            over = early_stop.is_over(state)
            if over:  # it was killed behind its last step
                trainer.state, steps = state, state.global_step
        if not over:
            with worker_errors_as_raised():
                resumed = str(checkpoint) if checkpoint else None
                steps = trainer.train(resume_from_checkpoint=resumed).global_step
        stopped = {}
        if early_stop is not None and (course := early_stop.course(trainer.state)).found:
            trainer.accelerator.wait_for_everyone()
            trainer.load_weights(early_stop.best_folder)
            stopped = {"best_step": float(course.step), f"best_{course.name}": course.best}
        seconds = time.monotonic() - started
        tokens, samples = trainer.totals()
        return {
            "steps": float(steps),
            "tokens": float(tokens),
            "samples": float(samples),
            "seconds": seconds,
            "tokens_per_s": tokens / max(seconds, 1e-9),
            **stopped,
        }

    def _measure(
        self, model: PreTrainedModel, held_out: HeldOut | None, event: str
    ) -> dict[str, float]:
        if held_out is None:
            return {}
        means = measure_student(model, held_out)
        reshard(model)
        if self.on_event is not None and held_out.rank == 0:
            self.on_event({"event": event, **means})
        return means

    def _save(
        self,
        model: PreTrainedModel,
        student: Path,
        metrics: Mapping[str, Mapping[str, float]],
        logged: tuple[tuple[Mapping[str, float], ...], Sequence[Mapping[str, float]]],
        weights: Mapping[str, Tensor] | None,
    ) -> None:
        """Write the folder, ``checkpoint.json`` last; only then do the checkpoints go."""
        try:
            model.save_pretrained(self.output, state_dict=weights)
        except OSError as error:
            raise StoreError(f"cannot write the student to {self.output}: {error}") from error
        copy_tokenizer(student, self.output)
        equal_modes(self.output)
        write_text(self.output / METRICS, json.dumps(metrics, indent=1, sort_keys=True) + "\n")
        history, speeds = logged
        record = CheckpointRecord(
            fingerprint=self.fingerprint,
            identity=self.identity,
            metrics=metrics,
            history=history,
            speeds=speeds,
        )
        write_checkpoint(self.output, record)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
