"""Supervised fine-tuning on chosen responses: cross-entropy of their tokens, the last included.

A mean over the step's response tokens; prompts are not learnt. The end-of-turn token is a token
like any other, so a student learns to stop; a response that was cut has none, and teaches nothing
of the kind. All values in nats.
"""

from typing import Any

from stages.student.objectives.cross_entropy import CrossEntropy
from stages.student.step import Step, Term
from stages.student.train_config import SftConfig


def terms(config: SftConfig, batch: dict[str, Any], step: Step) -> list[Term]:
    """Return the loss of a batch of ``ChosenCollator``."""
    return [step.over_positions(batch, CrossEntropy(batch["next_token_ids_N"]))]
