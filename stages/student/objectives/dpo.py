"""Direct preference optimisation with cached log-probs of the reference.

DPO (arXiv 2305.18290, equation 7), with w the chosen and l the rejected response:

    -log sigmoid(beta [(log pi(w) - log ref(w)) - (log pi(l) - log ref(l))])

Log-probs are sums over a response's tokens. The reference is the student before this training (or
whatever model made the table ``response_logprobs``): two numbers a pair, and no second model in
memory. A mean over the step's pairs. All values in nats.

Dimensions: B = pairs of the batch.
"""

from typing import Any

import torch
from torch.nn import functional

from stages.student.step import Step, Term
from stages.student.train_config import DpoConfig


def terms(config: DpoConfig, batch: dict[str, Any], step: Step) -> list[Term]:
    """Return the loss of a batch of ``DpoCollator``; rewards are beta times log-ratios."""
    logprobs_B2 = torch.stack(step.answer_logprobs(batch["answers"], wrapped=True))
    rewards_B2 = config.beta * (logprobs_B2 - batch["reference_logprobs"])
    margins_B = rewards_B2[:, 0] - rewards_B2[:, 1]
    loss = -functional.logsigmoid(margins_B).sum()
    known_B = margins_B.detach()
    sums = {"reward_margin": known_B.sum(), "reward_accuracy": (known_B > 0).to(known_B).sum()}
    return [Term(loss, sums, "samples")]
