"""LoRA: low-rank updates of a model's linear layers are trained, its own weights are not.

LoRA (arXiv 2106.09685): a layer's W becomes W + (alpha / rank) B A; A begins at random and B at 0,
so that what is untrained is the model without. PEFT makes the layers.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from schemas.errors import ConfigError, StoreError
from stages.models.checkpoints.adapters import ADAPTER_WEIGHTS
from stages.stage import StageConfig

ADDED = "lora_"  # what PEFT calls the matrices
ALL_LINEAR: Literal["all-linear"] = "all-linear"  # to PEFT: every linear layer but the head
_KEY = "base_model.model."  # what PEFT puts before a parameter's name in a file
_HEADS = ("lm_head", "embed_tokens")


class LoraSettings(StageConfig):
    """An adapter of ``rank``, times ``alpha`` / ``rank`` (by default 2).

    ``targets`` are names of linear layers, such as ``q_proj``; by default all but the head.
    ``dropout`` is that of what an update reads.
    """

    rank: int = Field(ge=1)
    alpha: float = Field(gt=0.0)
    targets: Literal["all-linear"] | tuple[str, ...] = Field(default=ALL_LINEAR, min_length=1)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)

    @model_validator(mode="before")
    @classmethod
    def _alpha_of_rank(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("rank"), int):
            return {"alpha": 2.0 * values["rank"]} | values
        return values

    @field_validator("targets")
    @classmethod
    def _no_head(cls, targets: Any) -> Any:
        if isinstance(targets, tuple) and (named := [t for t in targets if t in _HEADS]):
            raise ValueError(
                f"got '{named[0]}': the loss reads head and embeddings as they are, so LoRA leaves "
                f"them alone: name layers between them"
            )
        return targets

    def goes_on_from(self, other: "LoraSettings") -> bool:
        """Whether an adapter of ``other`` may be trained further as one of these settings."""
        mine, theirs = (one.model_dump(exclude={"dropout"}) for one in (self, other))
        return mine == theirs


def add_lora(body: Any, *, rank: int, alpha: float) -> None:
    """Give every linear layer of ``body``, in place, an update of this rank.

    Raises ConfigError where PEFT is not installed.
    """
    settings = LoraSettings(rank=rank, alpha=alpha)
    _peft("a distiller with lora_rank").inject_adapter_in_model(_config(settings), body)


def train_lora_alone(body: Any) -> None:
    """Take the gradient from every weight of ``body`` that is not an update's."""
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(ADDED in name)


def adapt_student(
    model: Any, settings: LoraSettings, *, seed: int, begin: Path | None, name: str
) -> None:
    """Put an adapter on a loaded student, whose own weights are held fixed from now on.

    Its matrices are those of the folder ``begin``, or drawn by ``seed``. ``save_pretrained`` then
    writes the adapter alone, as PEFT reads it. Raises ConfigError where PEFT is not installed or
    the student, called ``name``, has no such layers.
    """
    import torch

    _peft("lora")
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer, _ in model.named_modules()]
    for target in () if settings.targets == ALL_LINEAR else settings.targets:
        if not any(layer == target or layer.endswith(f".{target}") for layer in layers):
            found = {
                layer.rpartition(".")[2]
                for layer, module in model.named_modules()
                if isinstance(module, torch.nn.Linear)
                and module is not model.get_output_embeddings()
            }
            raise ConfigError(
                f"lora.targets: {name} has no layer '{target}', expected some of: "
                f"{', '.join(sorted(found))}"
            )
    config = _config(settings)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.add_adapter(config)
    except ValueError as error:
        raise ConfigError(f"lora: {name} takes no adapter: {error}") from error
    config.target_modules = sorted(config.target_modules)  # a set, which has no order in a file
    config.inference_mode = True  # as PEFT writes it
    config.base_model_name_or_path = str(Path(model.name_or_path).absolute())
    for part in (model.get_output_embeddings(), model.get_input_embeddings()):
        if isinstance(part, BaseTunerLayer):
            raise ConfigError(
                f"lora.targets: they take in head or embeddings of {name}, which the loss reads as "
                f"they are: name layers between them"
            )
    if begin is not None:
        load_lora(model, begin)


def load_lora(model: Any, folder: Path) -> None:
    """Put the matrices of a saved adapter in the place of the adapted model's own."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    saved = load_file(folder / ADAPTER_WEIGHTS[0])
    named = {key.removeprefix(_KEY): tensor for key, tensor in saved.items()}
    found = set_peft_model_state_dict(model, named)
    missing = [key for key in found.missing_keys if ADDED in key]
    if missing or found.unexpected_keys:
        raise StoreError(
            f"{folder} holds another adapter than the one to go on from: it has no "
            f"{(missing or found.unexpected_keys)[0]}; delete it and run its recipe again"
        )


def _config(settings: LoraSettings) -> Any:
    targets = settings.targets
    return _peft("lora").LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )


def _peft(what: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"{what} needs PEFT ({error}): install teachercache[align]") from error
    return peft
