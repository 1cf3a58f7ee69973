"""The Engine protocol, and the one way to open an engine.

An engine gives final hidden states (after the last norm: what the head reads), not log-probs: the
head runs here, in blocks of positions, and one encoding of the result serves both engines.

Dimensions: T = tokens of a sequence, D = hidden width.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal, Protocol, TypedDict

import torch
from torch import Tensor

from schemas.errors import ConfigError
from stages.models.causal_lm.language_head import LanguageHead, head_features, read_config
from stages.models.engines.head_check import (
    Reference,
    answers_of,
    check_adapter,
    check_head,
    chosen_check,
    own_reference_of,
    probe_sequences,
    reference_of,
    require_difference,
)
from stages.models.engines.sequences import TokenIds
from stages.models.engines.transformers_engine import TransformersEngine
from stages.models.engines.vllm_engine import VllmEngine
from stages.models.spec import EngineOptions, HeadCheck, ModelSpec

EngineKind = Literal["vllm", "transformers"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Place(TypedDict):
    dtype: torch.dtype
    device: torch.device
    options: EngineOptions


class HiddenStates(Protocol):
    """What scoring whole sequences needs of an engine. ``max_length`` is in tokens."""

    max_length: int
    head: LanguageHead

    def hidden_states(self, sequences: Sequence[TokenIds]) -> Iterator[Tensor]:
        """Yield [T, D] in the model's dtype for each sequence, in the order given.

        Raises EngineError for a sequence that is empty, too long or outside the vocabulary, and
        when the engine has died.
        """


class Engine(HiddenStates, Protocol):
    """A loaded model; ``device`` holds the head, which takes states from wherever they lie.

    vLLM's lie in ordinary memory: those that wait for the head take none of a GPU's.
    ``window`` is the model's own, of which settings or memory may leave less: ``max_length``.
    ``head_check`` is the check that was made of it.
    """

    device: torch.device
    window: int
    head_check: HeadCheck

    @property
    def kind(self) -> str:
        """``vllm`` or ``transformers``."""

    def last_hidden_states(
        self, sequences: Sequence[TokenIds], counts: Sequence[int]
    ) -> list[Tensor]:
        """Return [n, D] for the last n positions of each sequence, ``counts`` saying how many.

        Text that sequences share at their start is computed once, as far as the engine can:
        vLLM in whole blocks of its prefix cache, if opened with ``share_prefixes``; transformers
        for sequences that share one prefix. Raises what ``hidden_states`` raises.
        """

    def close(self) -> None:
        """Free the model and its memory; a closed engine cannot be used again."""


@contextmanager
def open_engine(
    kind: EngineKind,
    model_path: Path,
    *,
    dtype: str,
    options: EngineOptions,
    share_prefixes: bool = False,
) -> Iterator[Engine]:
    """Load an ordinary transformers folder into an engine, check its head, free it on exit.

    ``share_prefixes`` is for work that reads ``last_hidden_states`` of sequences with much text in
    common; it takes vLLM's prefix cache into use.

    Raises ConfigError for a folder or setting that cannot work, EngineError if the engine does not
    start or its log-probs disagree with transformers.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    set_threads(options)
    device = device_of(options)
    head_features(read_config(model_path))  # refuse an unknown head now, not after minutes
    check = chosen_check(model_path, dtype=DTYPES[dtype], device=device, options=options)
    if kind == "transformers" and check == "engine":
        check = "transformers"  # its own log-probs are those
    reference = _reference(check, model_path, DTYPES[dtype], device, options)
    place: _Place = {"dtype": DTYPES[dtype], "device": device, "options": options}
    engine: Engine
    if kind == "vllm":
        engine = VllmEngine(model_path, **place, share_prefixes=share_prefixes)
    else:
        engine = TransformersEngine(model_path, **place)
    engine.head_check = check
    try:
        if reference is not None:
            answers = _answers(engine)
            check_head(answers, reference, engine.head.dtype, model_path, made_by=check)
        yield engine
    finally:
        engine.close()


def open_model(
    model: ModelSpec, options: EngineOptions, *, share_prefixes: bool
) -> AbstractContextManager[Engine]:
    """Open the engine that a stage's model names; see ``open_engine``."""
    return open_engine(
        model.engine,
        model.path,
        dtype=model.dtype,
        options=options,
        share_prefixes=share_prefixes,
    )


@contextmanager
def open_adapted_engine(
    model_path: Path, adapter: Path, *, dtype: str, options: EngineOptions
) -> Iterator[VllmEngine]:
    """Load a base and a LoRA adapter that ``served_rank`` finds fit into one vLLM engine.

    Prefixes are shared. Both of its answers and their difference are checked; raises what
    ``open_engine`` raises.
    """
    set_threads(options)
    device = device_of(options)
    head_features(read_config(model_path))
    check = chosen_check(model_path, dtype=DTYPES[dtype], device=device, options=options)
    base_reference = _reference(check, model_path, DTYPES[dtype], device, options)
    adapted_reference = None
    if check == "transformers":
        adapted_reference = reference_of(
            model_path,
            dtype=DTYPES[dtype],
            device=device,
            cache_dir=options.cache_dir,
            adapter=adapter,
        )
    place: _Place = {"dtype": DTYPES[dtype], "device": device, "options": options}
    engine = VllmEngine(model_path, **place, share_prefixes=True, adapter=adapter)
    engine.head_check = check
    try:
        if base_reference is not None:
            _check_both(engine, base_reference, adapted_reference, model_path, adapter)
        yield engine
    finally:
        engine.close()


def _check_both(
    engine: VllmEngine,
    base_reference: Reference,
    adapted_reference: Reference | None,
    model_path: Path,
    adapter: Path,
) -> None:
    """Check the base, the adapted model and their difference, as far as there are references."""
    dtype = engine.head.dtype
    engine.use_adapter = True
    adapted = _answers(engine)
    engine.use_adapter = False
    base = _answers(engine)
    check_head(base, base_reference, dtype, model_path, made_by=engine.head_check)
    if adapted_reference is None:
        require_difference(base, adapted, adapter)
        return
    check_head(adapted, adapted_reference, dtype, adapter)
    check_adapter(base, adapted, (base_reference, adapted_reference), adapter)


def _reference(
    check: HeadCheck,
    model_path: Path,
    dtype: torch.dtype,
    device: torch.device,
    options: EngineOptions,
) -> Reference | None:
    if check == "off":
        return None
    if check == "engine":
        return own_reference_of(model_path, dtype=dtype, device=device, options=options)
    return reference_of(model_path, dtype=dtype, device=device, cache_dir=options.cache_dir)


def _answers(engine: Engine) -> list[Tensor]:
    probes = probe_sequences(engine.head.vocab_size)
    fitting = [ids_T[: engine.max_length] for ids_T in probes]
    return answers_of(engine.hidden_states(fitting), engine.head)


def set_threads(options: EngineOptions) -> None:
    """Take as many CPU threads as the options say, in all of this process."""
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)


def device_of(options: EngineOptions) -> torch.device:
    """Return where an engine is to run; raises ConfigError for a GPU that is not there."""
    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise ConfigError("engine.device is 'cuda', but torch sees no GPU: use 'auto' or 'cpu'")
    return torch.device("cuda" if has_gpu and options.device != "cpu" else "cpu")
