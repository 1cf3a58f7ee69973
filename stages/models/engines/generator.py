"""The Generator protocol, and the one way to open a generator: a model that writes.

Both take token ids and give token ids with the model's own raw log-probs. A response depends on
its prompt, its seed and the decoding alone, up to the last bits of a forward pass, which move with
what else is in the batch: equal calls meet equal batches and give equal tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from schemas.errors import ConfigError
from stages.models.engines.decoding import Decoding, Generated
from stages.models.engines.engine import DTYPES, EngineKind, device_of, set_threads
from stages.models.engines.sequences import TokenIds
from stages.models.engines.transformers_generator import TransformersGenerator
from stages.models.engines.vllm_generator import VllmGenerator
from stages.models.spec import EngineOptions


class Generator(Protocol):
    """A loaded model; prompt and response together have ``max_length`` tokens at most.

    ``window`` is the model's own, of which settings or memory may leave less: ``max_length``.
    """

    max_length: int
    window: int
    vocab_size: int

    @property
    def kind(self) -> str:
        """``vllm`` or ``transformers``."""

    def generate(
        self, prompts: Sequence[TokenIds], seeds: Sequence[int], decoding: Decoding
    ) -> Iterator[Generated]:
        """Yield a response to each prompt, in the order given; seeds are of 63 bits.

        Nothing ends one but a token of ``stop_token_ids`` or ``max_tokens``, and nothing that the
        model's folder says about sampling is used. Raises EngineError for a prompt that is empty,
        leaves less than ``max_tokens`` or is outside the vocabulary, and when the engine has died.
        """

    def close(self) -> None:
        """Free the model and its memory; a closed generator cannot be used again."""


@contextmanager
def open_generator(
    kind: EngineKind, model_path: Path, *, dtype: str, options: EngineOptions
) -> Iterator[Generator]:
    """Load an ordinary transformers folder into a generator, free it on exit.

    Raises ConfigError for a folder or setting that cannot work, EngineError if it does not start.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    set_threads(options)
    make = VllmGenerator if kind == "vllm" else TransformersGenerator
    generator: Generator = make(
        model_path, dtype=DTYPES[dtype], device=device_of(options), options=options
    )
    try:
        yield generator
    finally:
        generator.close()
