"""Which tables each objective reads, and a readable refusal where one is missing."""

from schemas.dataset import CachedDataset
from schemas.errors import ConfigError
from stages.student.train_config import (
    AdpaConfig,
    BiAlignConfig,
    DckdConfig,
    DpoConfig,
    IclDistillationConfig,
    KdConfig,
    ObjectiveConfig,
    SftConfig,
    lm_data_problem,
)


def check_tables(
    objective: ObjectiveConfig, dataset: CachedDataset, lm_dataset: CachedDataset | None
) -> None:
    """Raise ConfigError unless the opened tables hold what the objective reads."""
    num_tables = len(lm_dataset.manifests) if lm_dataset is not None else 0
    if problem := lm_data_problem(objective, num_tables=num_tables):
        raise ConfigError(problem)
    needed, lm_needed = _needed_tables(objective)
    _require(objective.loss, needed, dataset, "data")
    if isinstance(objective, AdpaConfig):
        _require_support(objective, dataset)
    if lm_dataset is not None:
        _require(objective.loss, lm_needed, lm_dataset, "lm_data")


def _needed_tables(objective: ObjectiveConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the tables needed in ``data`` and in ``lm_data``."""
    match objective:
        case KdConfig():
            return ("teacher_logits",), ()
        case BiAlignConfig():
            return ("episodes", "teacher_logits", "subset_preferences"), ()
        case IclDistillationConfig():
            signals = ("teacher_logits",) if objective.needs_teacher else ()
            scores = ("candidate_scores",) if objective.needs_teacher else ()
            return ("episodes", *scores), ("documents", *signals)
        case SftConfig():
            return ("preference_pairs",), ()
        case DpoConfig():
            return ("preference_pairs", "response_logprobs"), ()
        case DckdConfig():
            return ("preference_pairs", "teacher_logits"), ()
        case AdpaConfig():
            return ("preference_pairs", "responses", "advantages"), ()
        case _:
            return (), ()


def _require(loss: str, needed: tuple[str, ...], dataset: CachedDataset, name: str) -> None:
    found = [manifest.table for manifest in dataset.manifests]
    for table in needed:
        if table not in found:
            article = "an" if table[0] in "aeiou" else "a"
            raise ConfigError(
                f"objective '{loss}' needs {article} {table} table, the {name} has: "
                f"{', '.join(found)}; add the step that makes it to {name}"
            )


def _require_support(objective: AdpaConfig, dataset: CachedDataset) -> None:
    """The published code's advantages are another quantity than the paper's."""
    support = next(m.variant for m in dataset.manifests if m.table == "advantages")
    if (support == "as_released") != (objective.mode == "as_released"):
        raise ConfigError(
            f"objective 'adpa' in mode '{objective.mode}' cannot read advantages of support "
            f"'{support}': mode as_released reads support as_released, mode paper any other"
        )
