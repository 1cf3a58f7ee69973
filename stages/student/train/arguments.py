"""A run's settings as ``transformers.Trainer`` spells them."""

from pathlib import Path

import torch
from transformers import (
    TrainingArguments,
)

from schemas.errors import ConfigError
from stages.student.options import TrainOptions
from stages.student.packages import require_packages
from stages.student.train.sharding import sharding_arguments
from stages.student.train.stage import TrainConfig

OPTIMIZERS = {"adafactor": "adafactor", "adamw_8bit": "adamw_bnb_8bit"}  # as transformers has them


class RunArguments(TrainingArguments):  # type: ignore[misc]  # transformers is untyped
    """The Trainer's arguments, but for a run of a single step: that is not all warm-up, at lr 0."""

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Return how many of the steps warm up: a share of them, rounded up."""
        return 0 if num_training_steps == 1 else super().get_warmup_steps(num_training_steps)


def training_arguments(
    config: TrainConfig, options: TrainOptions, folder: Path
) -> TrainingArguments:
    """Translate a run for the Trainer; starts the process group when a launcher asked for one.

    Raises ConfigError when a step's rows cannot be divided over the group, or a package is missing.
    """
    on_gpu = options.device == "auto" and torch.cuda.is_available()
    require_packages([*config.packages(), *options.packages()])
    if config.attn_implementation not in ("sdpa", "eager") and not on_gpu:
        raise ConfigError(
            f"attn_implementation: {config.attn_implementation} trains on a GPU alone, and there "
            f"is none here: leave it out, or choose sdpa or eager"
        )
    # Unnamed, AdamW is what transformers takes by itself: torch's own, fused.
    optimizer = {} if config.optimizer == "adamw" else {"optim": OPTIMIZERS[config.optimizer]}
    sharding = sharding_arguments() if options.sharding == "full" else {}
    args = RunArguments(
        **optimizer,
        **sharding,
        output_dir=str(folder),
        max_steps=config.max_steps or -1,
        num_train_epochs=config.epochs or 1.0,
        learning_rate=config.lr,
        lr_scheduler_type=config.scheduler,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        data_seed=config.seed,
        bf16=config.dtype == "bfloat16",
        gradient_checkpointing=config.gradient_checkpointing,
        use_cpu=not on_gpu,
        logging_steps=options.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would hide a loss that is not a number
        save_steps=options.checkpoint_every,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=options.num_workers,
        dataloader_persistent_workers=options.num_workers > 0,
        dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=True,
    )
    if args.n_gpu > 1:
        args._n_gpu = 1  # several GPUs go through a launcher and DDP, never through DataParallel
    if sharding:
        config.require_shards(args.world_size)
    share = config.share(args.world_size)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = share
    return args
