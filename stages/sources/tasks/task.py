"""What a few-shot task is, and the checks its examples pass, whatever file they come from.

Text is kept as it stands: a label's leading space is part of the label.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from schemas.errors import ConfigError
from stages.sources.reading.cleaning import digest_of


@dataclass(frozen=True, slots=True)
class Example:
    """An input in each of its task's wordings (one, but for LAMA), its answer and its options.

    ``options`` is empty where the row declares none; ``place`` is ``file:line``.
    """

    inputs: tuple[str, ...]
    output: str
    options: tuple[str, ...]
    place: str

    @property
    def content(self) -> str:
        """What the example is, wherever it was read: 32 hex digits."""
        return digest_of(self.inputs, self.output, self.options)


@dataclass(frozen=True, slots=True)
class Task:
    """A name, a kind, distinct examples, and the options they all share (classification).

    ``heldout_only`` marks a task that must never be trained on.
    """

    name: str
    kind: str
    examples: tuple[Example, ...]
    options: tuple[str, ...] = ()
    heldout_only: bool = False

    def options_of(self, example: Example) -> tuple[str, ...]:
        """Return the candidates of an example; none for generation."""
        return self.options or example.options


def make_task(
    name: str,
    kind: str,
    examples: Sequence[Example],
    *,
    counts: Counter[str],
    options: Sequence[str] = (),
    heldout_only: bool = False,
) -> Task:
    """Check the examples and drop those that were there already.

    ``options`` are fixed ones of a classification task; without any, those the rows declare, or
    else the sorted distinct outputs. Raises ConfigError naming file and line of a bad example.
    """
    for example in examples:
        _check_texts(name, example)
    shared = _shared_options(name, examples, options) if kind == "classification" else ()
    for example in examples:
        _check_gold(name, kind, example, shared or example.options)
    kept = distinct(examples)
    counts["duplicate_example"] += len(examples) - len(kept)
    bare = kept if kind != "classification" else [_without_options(example) for example in kept]
    return Task(name, kind, tuple(bare), shared, heldout_only)


def distinct(examples: Sequence[Example]) -> list[Example]:
    """Return the examples, the first of those with one input and output."""
    keys = [digest_of(example.inputs, example.output) for example in examples]
    first = pl.DataFrame({"key": keys}).with_row_index().unique("key", keep="first")
    return [examples[index] for index in first["index"].sort()]


def _without_options(example: Example) -> Example:
    return Example(example.inputs, example.output, (), example.place)


def _check_texts(name: str, example: Example) -> None:
    if not all(text.strip() for text in example.inputs):
        raise ConfigError(f"{example.place}: task '{name}': empty input; remove the row")
    if not example.output.strip():
        raise ConfigError(f"{example.place}: task '{name}': empty answer; remove the row")
    for text in (*example.inputs, example.output, *example.options):
        try:
            text.encode()
        except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and UTF-8 cannot
            raise ConfigError(
                f"{example.place}: task '{name}': text is not valid Unicode; repair the row"
            ) from None


def _check_gold(name: str, kind: str, example: Example, options: Sequence[str]) -> None:
    where = f"{example.place}: task '{name}'"
    if kind == "generation":
        if options:
            raise ConfigError(f"{where}: got {len(options)} options, a generation task has none")
        return
    if not options:
        raise ConfigError(f"{where}: no options, and a {kind} row needs them; add them")
    again = [option for option, count in Counter(options).items() if count > 1]
    if again:
        raise ConfigError(f"{where}: option '{again[0]}' is there twice; remove one")
    if any(not option.strip() for option in options):
        raise ConfigError(f"{where}: an option is empty; remove it")
    if example.output not in options:
        raise ConfigError(
            f"{where}: answer '{example.output}' is not among the options {_some(options)}; "
            f"repair the row or the options"
        )


def _shared_options(
    name: str, examples: Sequence[Example], fixed: Sequence[str]
) -> tuple[str, ...]:
    declared = {example.options: example.place for example in examples}
    spaces = {tuple(sorted(options)) for options in declared}
    if len(spaces) > 1:
        (first, place), (second, other) = list(declared.items())[:2]
        raise ConfigError(
            f"task '{name}' mixes label spaces: {place} has {_some(first)}, {other} has "
            f"{_some(second)}; a classification task has one, so part them or use multiple choice"
        )
    options = tuple(fixed) or next(iter(declared)) or tuple(sorted({e.output for e in examples}))
    if len(options) < 2:
        raise ConfigError(
            f"task '{name}': {_some(options)} is its only label, and a classification task needs "
            f"two; give it 'options' or more rows"
        )
    return options


def _some(options: Sequence[str]) -> str:
    shown = ", ".join(f"'{option}'" for option in options[:6])
    return f"[{shown}, ... {len(options)} in all]" if len(options) > 6 else f"[{shown}]"
