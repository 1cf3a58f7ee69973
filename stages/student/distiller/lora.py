"""LoRA on a distiller's body: low-rank updates of its linear layers are trained, its weights not.

LoRA (arXiv 2106.09685): a layer's W becomes W + (alpha / rank) B A; A begins at random and B at 0,
so that an untrained distiller is the one without. PEFT makes the layers.
"""

from typing import Any

from schemas.errors import ConfigError

ADDED = "lora_"  # what PEFT calls the matrices


def add_lora(body: Any, *, rank: int, alpha: float) -> None:
    """Give every linear layer of ``body``, in place, an update of this rank.

    Raises ConfigError where PEFT is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            f"a distiller with lora_rank needs PEFT ({error}): install teachercache[align]"
        ) from error
    settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear")
    inject_adapter_in_model(settings, body)


def train_lora_alone(body: Any) -> None:
    """Take the gradient from every weight of ``body`` that is not an update's."""
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(ADDED in name)
