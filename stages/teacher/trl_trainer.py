"""TRL's DPOTrainer on rows that have their token ids and their reference's log-probs already.

DPO (arXiv 2305.18290). TRL tokenises text, adds an EOS and cuts to a length of its own; what it is
given here has its ids already, so all three are switched off, and the aligned teacher has seen the
sequences that it will score.

Dimensions: B = pairs.
"""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from schemas.errors import ConfigError
from stages.models.checkpoints.tokenizer import open_tokenizer
from stages.teacher.stage import AlignConfig

F64Array = npt.NDArray[np.float64]
OnEvent = Callable[[dict[str, Any]], None]


def train_on_pairs(
    config: AlignConfig,
    model: PreTrainedModel,
    rows: Sequence[Mapping[str, Any]],
    reference_B2: F64Array,
    *,
    scratch: Path,
    on_event: OnEvent | None,
) -> tuple[PreTrainedModel, dict[str, float]]:
    """Return the trained model, an adapter merged, and the run's numbers.

    Raises ConfigError where TRL, or PEFT for an adapter, is not installed.
    """
    trl, lora = _libraries(config)
    trainer = pair_trainer(trl)(
        model=model,
        args=dpo_arguments(trl, config, scratch),
        train_dataset=as_token_ids(rows, reference_B2),
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
    return open_tokenizer(Path(model.name_or_path))


def dpo_arguments(trl: Any, config: AlignConfig, scratch: Path) -> Any:
    """Translate a run for TRL; nothing is written but by us."""
    args = _arguments_of(trl)(
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


def _arguments_of(trl: Any) -> Any:
    class RunArguments(trl.DPOConfig):  # type: ignore[misc]  # TRL is untyped
        """A run of a single step is not all warm-up, at lr 0."""

        def get_warmup_steps(self, num_training_steps: int) -> int:
            steps: int = super().get_warmup_steps(num_training_steps)
            return 0 if num_training_steps == 1 else steps

    return RunArguments


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
