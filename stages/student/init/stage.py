"""Stage ``student_init``: which of a model's layers a student is made of."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from schemas.errors import ConfigError
from stages.stage import FolderStage, Kind, TableRef

_NUM_LAYERS = ("num_hidden_layers", "n_layer", "n_layers")  # as configs spell it


class StudentInitStage(FolderStage):
    """Make a student of ``model``: its tokenizer, embeddings, head and some of its layers.

    ``layers`` is a number, kept evenly spaced, or a list of indices. With ``tokenizer``, a model of
    the recipe or a folder, the student has that one, and rows for its tokens (``vocabulary``).
    """

    KIND: ClassVar[Kind] = "checkpoint"
    VERSION: ClassVar[int] = 1
    NOT_HASHED: ClassVar[tuple[str, ...]] = ("model", "tokenizer")
    RUNS: ClassVar[tuple[str, ...]] = ("model",)
    TOKENIZER: ClassVar[str] = "tokenizer"

    stage: Literal["student_init"]
    model: str
    layers: int | tuple[int, ...]
    tokenizer: str | None = None

    def check(self, tables: Sequence[TableRef], models: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse layers that the model does not have, where its config is there to be read."""
        config = models[self.model].get("config", {})
        text = config.get("text_config") or config
        num_layers = next((text[name] for name in _NUM_LAYERS if name in text), None)
        if isinstance(num_layers, int):
            chosen_layers(self.layers, num_layers)


def chosen_layers(layers: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Return the indices to keep; raises ConfigError where they do not fit ``num_layers``."""
    if isinstance(layers, int):
        return evenly_spaced(layers, num_layers)
    kept = tuple(layers)
    outside = [index for index in kept if not 0 <= index < num_layers]
    if outside or not kept:
        raise ConfigError(
            f"layers: got {list(kept)}, expected indices from 0 to {num_layers - 1} of the "
            f"teacher's {num_layers} layers"
        )
    if any(later <= earlier for earlier, later in itertools.pairwise(kept)):
        raise ConfigError(
            f"layers: got {list(kept)}, expected each index once and in rising order, such as "
            f"{sorted(set(kept))}"
        )
    return kept


def evenly_spaced(count: int, num_layers: int) -> tuple[int, ...]:
    """Return ``count`` indices with the first and the last, at steps as equal as they can be.

    Where the steps cannot be equal the longer ones, by one, come last: 10 of 30 layers are 0, 3,
    6, 9, 12, 15, 18, 21, 25, 29.
    """
    if not 2 <= count <= num_layers:
        raise ConfigError(
            f"layers: got {count}, expected 2 to {num_layers} (the teacher's number of layers), "
            f"or a list such as [0] for just those"
        )
    step, longer = divmod(num_layers - 1, count - 1)
    shorter = count - 1 - longer
    return tuple(index * step + max(0, index - shorter) for index in range(count))
