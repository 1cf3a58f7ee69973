"""Two models over the same sequences: side by side where memory allows, else one after the other.

Both ways give each model the same sequences in the same order, so they give the same numbers (on a
GPU to the last bits only: there half the memory may cut vLLM's batches elsewhere). One after the
other, each shard costs one start of an engine: the one that is open last goes first with the next
shard. So shards should be large there.

A plain LoRA adapter and its base are one vLLM engine, which serves both in turn.

Two vLLM engines live in one process as long as none is closed: what closing one frees, both use.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol, TypeVar

import torch

from stages.models.available_memory import available_memory
from stages.models.causal_lm.language_head import LanguageHead
from stages.models.checkpoints.adapters import served_rank
from stages.models.engines.engine import DTYPES, Engine, open_adapted_engine, open_model
from stages.models.engines.memory import weight_bytes
from stages.models.engines.vllm_engine import VllmEngine
from stages.models.spec import EngineOptions, HeadCheck, ModelSpec

Result = TypeVar("Result")
ModelPair = tuple[ModelSpec, ModelSpec]


class EnginePair(Protocol):
    """Two models, first and second."""

    def each(self, run: Callable[[Engine], Result]) -> tuple[Result, Result]:
        """Return what ``run`` gives for the first and for the second engine.

        Results that are kept in an engine's memory may be gone when the other runs: take copies.
        """

    def heads(self) -> tuple[LanguageHead, LanguageHead]:
        """Return both heads, on the engines' device; good until the next ``each``."""

    @property
    def head_checks(self) -> tuple[HeadCheck, ...]:
        """The checks that were made of the first and of the second, of one engine once."""


@contextmanager
def open_engine_pair(models: ModelPair, *, options: EngineOptions) -> Iterator[EnginePair]:
    """Open both models, at once if they fit together; free them on exit.

    Prefixes are shared, as in ``open_engine``, which says what is raised.
    """
    pair: AbstractContextManager[EnginePair]
    if is_one_engine(models):
        pair = OneEngine.opened(models, options)
    elif fit_together(models, options):
        pair = SideBySide.opened(models, options)
    else:
        pair = OneAfterTheOther.opened(models, options)
    with pair as opened:
        yield opened


def is_one_engine(models: ModelPair) -> bool:
    """Whether one of the two is the other with an adapter that vLLM can serve beside it."""
    first, second = models
    same = (first.base, first.dtype, first.engine) == (second.base, second.dtype, "vllm")
    adapters = [found for model in models if (found := model.local_adapter) is not None]
    return same and len(adapters) == 1 and served_rank(adapters[0]) is not None


class OneEngine:
    """Base and adapter in one engine; they share the head."""

    def __init__(self, engine: VllmEngine, adapted: tuple[bool, bool]) -> None:
        """Take an open engine, and which of the two models is the adapted one."""
        self._engine, self._adapted = engine, adapted

    @classmethod
    @contextmanager
    def opened(cls, models: ModelPair, options: EngineOptions) -> Iterator["OneEngine"]:
        """Open the base with the adapter beside it."""
        first, second = models
        adapter = first.local_adapter or second.local_adapter
        assert adapter is not None, "is_one_engine said so"
        opened = open_adapted_engine(first.local_base, adapter, dtype=first.dtype, options=options)
        with opened as engine:
            yield cls(engine, (first.adapter is not None, second.adapter is not None))

    def each(self, run: Callable[[Engine], Result]) -> tuple[Result, Result]:
        """Run the first, then the second."""
        first, second = (self._as(adapted, run) for adapted in self._adapted)
        return first, second

    def _as(self, adapted: bool, run: Callable[[Engine], Result]) -> Result:
        self._engine.use_adapter = adapted
        return run(self._engine)

    def heads(self) -> tuple[LanguageHead, LanguageHead]:
        """Return the one head twice."""
        return self._engine.head, self._engine.head

    @property
    def head_checks(self) -> tuple[HeadCheck, ...]:
        """The one engine's."""
        return (self._engine.head_check,)


class SideBySide:
    """Both engines are open all the time, on half a GPU's memory each."""

    def __init__(self, first: Engine, second: Engine) -> None:
        """Take two open engines."""
        self._engines = first, second

    @classmethod
    @contextmanager
    def opened(cls, models: ModelPair, options: EngineOptions) -> Iterator["SideBySide"]:
        """Open both."""
        halves = options.model_copy(
            update={"gpu_memory_utilization": options.gpu_memory_utilization / 2}
        )
        first, second = (open_model(model, halves, share_prefixes=True) for model in models)
        with first as one, second as other:
            yield cls(one, other)

    def each(self, run: Callable[[Engine], Result]) -> tuple[Result, Result]:
        """Run the first, then the second."""
        first, second = self._engines
        return run(first), run(second)

    def heads(self) -> tuple[LanguageHead, LanguageHead]:
        """Return the engines' own heads."""
        first, second = self._engines
        return first.head, second.head

    @property
    def head_checks(self) -> tuple[HeadCheck, ...]:
        """Each engine's."""
        first, second = self._engines
        return first.head_check, second.head_check


class OneAfterTheOther:
    """One engine is open at a time; the other's head is read from its folder when needed."""

    def __init__(self, models: ModelPair, options: EngineOptions) -> None:
        """Open nothing yet."""
        self._models, self._options = models, options
        self._open: tuple[int, Engine] | None = None
        self._checks: dict[int, HeadCheck] = {}
        self._stack = ExitStack()

    @classmethod
    @contextmanager
    def opened(cls, models: ModelPair, options: EngineOptions) -> Iterator["OneAfterTheOther"]:
        """Close on exit whichever is open then."""
        pair = cls(models, options)
        try:
            yield pair
        finally:
            pair._stack.close()

    def each(self, run: Callable[[Engine], Result]) -> tuple[Result, Result]:
        """Run the one that is open, then the other, which is open afterwards."""
        start = 0 if self._open is None else self._open[0]
        found = {index: run(self._engine(index)) for index in (start, 1 - start)}
        return found[0], found[1]

    def heads(self) -> tuple[LanguageHead, LanguageHead]:
        """Return the open engine's head and, read again, that of the other."""
        return self._head(0), self._head(1)

    @property
    def head_checks(self) -> tuple[HeadCheck, ...]:
        """Each engine's when it was opened last."""
        return tuple(self._checks[index] for index in sorted(self._checks))

    def _engine(self, index: int) -> Engine:
        if self._open is None or self._open[0] != index:
            self._open = None
            self._stack.close()
            opened = open_model(self._models[index], self._options, share_prefixes=True)
            self._open = index, self._stack.enter_context(opened)
            self._checks[index] = self._open[1].head_check
        return self._open[1]

    def _head(self, index: int) -> LanguageHead:
        assert self._open is not None, "heads are asked for after each()"
        open_index, engine = self._open
        if index == open_index:
            return engine.head
        return head_of(self._models[index], device=engine.device)


def head_of(model: ModelSpec, *, device: torch.device | str) -> LanguageHead:
    """Load a model's head without the model; an adapter that vLLM serves leaves it alone."""
    adapter = model.local_adapter
    keeps_head = adapter is not None and served_rank(adapter) is not None
    folder = model.local_base if keeps_head else model.path
    return LanguageHead.from_model_folder(folder, device=device, dtype=DTYPES[model.dtype])


def fit_together(models: ModelPair, options: EngineOptions) -> bool:
    """Whether both models with their caches fit in what is free now.

    A GPU's free memory is asked for as vLLM does: each engine takes its half of
    ``gpu_memory_utilization`` whatever it needs. On a CPU the start-up check holds one more copy of
    a model for a moment. Other workers that start at the same time are not known here.
    """
    weights = [weight_bytes(model.path, DTYPES[model.dtype]) for model in models]
    cache = options.cache_bytes  # on a GPU the least that is of use
    if torch.cuda.is_available() and options.device != "cpu":
        free, total = torch.cuda.mem_get_info()
        half = options.gpu_memory_utilization * total / 2
        return max(weights) / options.num_devices + cache <= half <= free / 2
    return sum(weights) + max(weights) + 2 * cache <= available_memory()
