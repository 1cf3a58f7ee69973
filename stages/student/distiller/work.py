"""The work of ``distiller_init``: a model's body, prompt embeddings, and the reader's width."""

from pathlib import Path

from schemas.errors import ConfigError, IdentityMismatch
from stages.models.causal_lm.language_head import max_positions, read_config
from stages.models.checkpoints.checkpoint import CheckpointRecord, require_whole, write_checkpoint
from stages.models.checkpoints.tokenizer_identity import copy_tokenizer, vocabulary_fingerprint
from stages.stage import StepJob
from stages.student.distiller.distiller import distiller_of
from stages.student.distiller.reader import reader_fingerprint
from stages.student.distiller.stage import DistillerInitStage


def make(stage: DistillerInitStage, job: StepJob) -> None:
    """Make the distiller of a step."""
    model, reader = job.models[stage.model], job.models[stage.reader]
    for spec in (model, reader):
        require_whole(spec.path)
    found, expected = (vocabulary_fingerprint(spec.path) for spec in (model, reader))
    if found != expected:
        raise IdentityMismatch(
            f"model '{stage.model}' has vocabulary {found[:12]}, reader '{stage.reader}' has "
            f"{expected[:12]}: make the distiller of a model with the reader's own"
        )
    _require_room(stage, stage.model, model.path, "demonstrations before them")
    _require_room(stage, stage.reader, reader.path, "a query after them")
    distiller = distiller_of(
        model.path,
        num_vectors=stage.num_vectors,
        reader_hidden_size=reader.hidden_size,
        reader=reader_fingerprint(reader.path),
        seed=stage.seed,
        lora_rank=stage.lora_rank or 0,
        lora_alpha=stage.alpha,
    )
    distiller.save_pretrained(job.output)
    copy_tokenizer(model.path, job.output)
    record = CheckpointRecord(fingerprint=job.fingerprint, identity=job.identity)
    write_checkpoint(job.output, record)


def _require_room(stage: DistillerInitStage, name: str, folder: Path, what: str) -> None:
    window = max_positions(read_config(folder).get_text_config())
    if window is not None and stage.num_vectors >= window:
        raise ConfigError(
            f"num_vectors is {stage.num_vectors}, and '{name}' reads {window} tokens at once: "
            f"lower it, so that there is room for {what}"
        )
