#!/usr/bin/env bash
# axolotl 0.19.0 (liger-kernel 0.8.1, torch 2.13.0, CPU): the distillation loss grows with the temperature squared, its gradient does not.
#
# Its loss over a teacher's top-k log-probs multiplies the soft part by kd_temperature^2 after the gradients of the chunks were taken, so the
# value returned has the factor and the gradient that backward gives has not. What is trained is then not what is reported: with
# `kd_temperature: 2` beside a hard loss, the soft part pulls with a quarter of the weight that its value and `kd_alpha` say.
#
# Measured by central differences of the loss itself, along the gradient, over hidden states and head together.
# Seen: difference / gradient of the soft loss is 1 at temperature 1, 4 at 2, 16 at 4; of the hard loss 1 at each.
# Expected: 1 everywhere.
# Only the loss is run, as installed: the __init__ of the plugin it lies in, which wants a trainer's whole environment, is passed over (an
# empty module stands for it), and nothing is compiled (`compiled=False`).
# Fails when the gradient has the factor too.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy>=2,<3"
"$folder/venv/bin/pip" install --quiet --no-deps "axolotl==0.19.0" "liger-kernel==0.8.1"

cat >"$folder/gradient.py" <<'PYTHON'
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

plugin = ModuleType("axolotl.integrations.kd")
plugin.__path__ = [str(Path(find_spec("axolotl").origin).parent / "integrations" / "kd")]
sys.modules[plugin.__name__] = plugin
from axolotl.integrations.kd.kernels import LigerFusedLinearKLTopKLogprobLoss

print(*(f"{name} {version(name)}" for name in ("axolotl", "liger-kernel", "torch")))
TOKENS, HIDDEN, VOCAB, TOP_K, STEP = 6, 16, 40, 8, 0.01
torch.manual_seed(0)
hidden, head = torch.randn(1, TOKENS, HIDDEN), 0.5 * torch.randn(VOCAB, HIDDEN)
labels, teacher = torch.randint(0, VOCAB, (1, TOKENS)), 2 * torch.randn(1, TOKENS, VOCAB)


def ratio(temperature: float, hard: float) -> float:
    """Slope of the loss along its gradient, over the gradient's length; the soft loss has the weight that the hard one leaves."""
    values, ids = (teacher / temperature).topk(TOP_K)
    loss_fn = LigerFusedLinearKLTopKLogprobLoss(
        weight_hard_loss=hard,
        weight_soft_loss=1.0 - hard,
        temperature=temperature,
        beta=0.0,
        compiled=False,
        compute_ce_loss=hard > 0.0,
    )

    def loss(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return loss_fn(head, hidden, ids, values.log_softmax(-1), torch.ones_like(ids), labels)

    inputs = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    value = loss(*inputs)
    gradients = torch.autograd.grad(value, inputs)
    length = sum(g.square().sum() for g in gradients).sqrt()
    above, below = (
        loss(*(x + sign * STEP * g / length for x, g in zip((hidden, head), gradients))) for sign in (1, -1)
    )
    found = ((above - below) / (2 * STEP * length)).item()
    print(f"temperature {temperature:g}, {'hard' if hard else 'soft'} loss {value.item():.3f}: difference / gradient {found:.3f}")
    return round(found, 2)


soft = [ratio(temperature, 0.0) for temperature in (1.0, 2.0, 4.0)]
hard = [ratio(temperature, 1.0) for temperature in (1.0, 2.0, 4.0)]
assert hard == [1.0, 1.0, 1.0] and soft[0] == 1.0
sys.exit(0 if soft[1:] == [4.0, 16.0] else f"ratios at 2 and 4 are {soft[1:]}, seen before 4 and 16: axolotl has changed")
PYTHON
"$folder/venv/bin/python" "$folder/gradient.py"
