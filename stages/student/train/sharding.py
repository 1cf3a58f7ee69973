"""FSDP: a student's weights, gradients and optimizer state are divided over the processes of a run.

Each process holds its part of every layer, gathers a layer's weights for as long as it is used, and
keeps its part of the summed gradients (``torch.distributed.fsdp.fully_shard``, by accelerate).
Head, embeddings and last norm stay gathered from the forward to the end of the backward: the loss
reads the head between the two. Weights are gathered in float32; matrix products have the run's
dtype, as without.
"""

from pathlib import Path
from types import MethodType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer

from schemas.errors import ConfigError
from stages.student.options import Sharding

_OPTIMIZER = "optimizer.bin"  # as accelerate writes the state of a divided run


def sharding_arguments() -> dict[str, Any]:
    """Return what the Trainer's arguments are to say of it; a new one each time, as it is changed.

    Gradients are divided after each batch, so that none is held whole.
    """
    divided = {"version": 2, "reshard_after_forward": True, "state_dict_type": "FULL_STATE_DICT"}
    each_batch = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    return {"fsdp": True, "fsdp_config": divided, "accelerator_config": each_batch}


def set_sharding(trainer: Trainer, dtype: torch.dtype) -> None:
    """Have the Trainer divide its model when it begins to train; products are of ``dtype``.

    accelerate 1.15 takes FSDP on accelerators alone; on CPUs it would copy the student (DDP).
    """
    state, args = trainer.accelerator.state, trainer.args
    if args.fsdp_plugin_args is None:
        return
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        trainer.is_fsdp_enabled = True
    state.fsdp_plugin.mixed_precision_policy = None  # of what is gathered, which stays float32
    if dtype != torch.float32:
        products = torch.autocast(args.device.type, dtype=dtype)
        trainer.model.forward = MethodType(products(type(trainer.model).forward), trainer.model)


def reshard(model: PreTrainedModel) -> None:
    """Let go of weights that a forward has left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_weights(model: PreTrainedModel, trainer: Trainer) -> dict[str, Tensor]:
    """Return all weights of a divided model, in the main process; all have to ask.

    A weight with two names, as of a head that is the embeddings, has the first.
    """
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    seconds = names - {name for name, _ in model.named_parameters()}
    weights: dict[str, Tensor] = trainer.accelerator.get_state_dict(model)
    return {name: weight for name, weight in weights.items() if name not in seconds}


def own_part(weight: Tensor) -> Tensor:
    """Return what this process holds of a weight."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def require_same_sharding(checkpoint: Path | None, sharding: Sharding) -> None:
    """Raise ConfigError for a checkpoint of a run that was divided otherwise."""
    if checkpoint is None:
        return
    was: Sharding = "full" if (checkpoint / _OPTIMIZER).exists() else "none"
    if was != sharding:
        raise ConfigError(
            f"{checkpoint} was written with execution.training_sharding: {was}, this run has "
            f"'{sharding}': go on with {was}, or delete {checkpoint.parent} to begin again"
        )
