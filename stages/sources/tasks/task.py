"""What a few-shot task is, and the checks its examples pass, whatever file they come from.

Text is kept as it stands: a label's leading space is part of the label. The options of a
multiple-choice example are put in the order of a hash of its input and of each of them: where they
stood in the file says nothing (in many published tasks the right one comes first), so nothing that
reads a row can tell by place, or win a tie by it.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from schemas.errors import ConfigError
from stages.sources.reading.cleaning import digest_of
from stages.sources.reading.lines import valid
from stages.sources.reading.rejects import MalformedRecord, Rejects, UnusableRecord


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
    rejects: Rejects,
    options: Sequence[str] = (),
    heldout_only: bool = False,
) -> Task | None:
    """Check the examples, reject those that will not do and drop those that were there already.

    ``options`` are fixed ones of a classification task; without any, those that most rows declare,
    or else the sorted distinct outputs. None where no example is left, which is counted as
    ``task_without_examples``. Raises ConfigError for a classification task of one label.
    """
    usable = _passing(examples, rejects, _check_texts)
    shared: tuple[str, ...] = ()
    if kind == "classification" and usable:
        shared = _shared_options(name, usable, options)
        if any(example.options for example in usable):
            usable = _passing(usable, rejects, lambda example: _check_space(example, shared))
    usable = _passing(usable, rejects, lambda example: _check_gold(kind, example, shared))
    if not usable:
        rejects.add(f"task '{name}'", UnusableRecord("task_without_examples", "none is left"))
        return None
    options_of = _no_options if kind == "classification" else _shuffled
    with_options = [replace(example, options=options_of(example)) for example in usable]
    kept = _passing(with_options, rejects, _check_distinct(name))
    return Task(name, kind, tuple(kept), shared, heldout_only)


def kind_by_options(examples: Sequence[Example]) -> str:
    """Return what most rows declare options for: none is generation, one set classification."""
    declared = [example.options for example in examples if example.options]
    if 2 * len(declared) < len(examples):
        return "generation"
    spaces = {tuple(sorted(options)) for options in declared}
    return "classification" if len(spaces) == 1 else "multiple_choice"


def _passing(
    examples: Sequence[Example], rejects: Rejects, check: Callable[[Example], None]
) -> list[Example]:
    kept = []
    for example in examples:
        with rejects.passing(example.place):
            check(example)
            kept.append(example)
    return kept


def _check_distinct(name: str) -> Callable[[Example], None]:
    """Return a check that refuses what it has seen: input, output and options as they were."""
    places: dict[str, str] = {}

    def check(example: Example) -> None:
        if (content := example.content) in places:
            raise UnusableRecord("duplicate_example", f"task '{name}' has it at {places[content]}")
        places[content] = example.place

    return check


def _no_options(example: Example) -> tuple[str, ...]:
    return ()


def _shuffled(example: Example) -> tuple[str, ...]:
    return tuple(sorted(example.options, key=lambda option: digest_of(example.inputs, option)))


def _check_texts(example: Example) -> None:
    for text in (*example.inputs, example.output, *example.options):
        valid(text, "a text")
    if not all(text.strip() for text in example.inputs):
        raise UnusableRecord("empty_input", "the input is empty")
    if not example.output.strip():
        raise UnusableRecord("empty_answer", "the answer is empty")
    if any(not option.strip() for option in example.options):
        raise UnusableRecord("empty_option", f"an option of {_some(example.options)} is empty")
    again = _twice(example.options)
    if again is not None:
        raise MalformedRecord("repeated_option", f"option '{again}' is there twice")


def _check_space(example: Example, shared: Sequence[str]) -> None:
    if not example.options:
        raise MalformedRecord("no_options", "no options, and the task's other rows have them")
    if sorted(example.options) != sorted(shared):
        raise MalformedRecord(
            "other_options",
            f"its options are {_some(example.options)}, and the task's are {_some(shared)}: a "
            f"classification task has one label space, so part them or use multiple choice",
        )


def _check_gold(kind: str, example: Example, shared: Sequence[str]) -> None:
    options = shared or example.options
    if kind == "generation":
        if options:
            detail = f"got options {_some(options)}, a generation task has none"
            raise MalformedRecord("unexpected_options", detail)
    elif not options:
        raise MalformedRecord("no_options", f"no options, and a {kind} row needs them")
    elif example.output not in options:
        raise MalformedRecord(
            "answer_not_an_option",
            f"answer '{example.output}' is not among the options {_some(options)}",
        )


def _shared_options(
    name: str, examples: Sequence[Example], fixed: Sequence[str]
) -> tuple[str, ...]:
    """Return the fixed options, those most rows declare, as the first has them, or all outputs."""
    declared = [example.options for example in examples if example.options]
    options = tuple(fixed)
    if not options and declared:
        (space, _), *_ = Counter(tuple(sorted(each)) for each in declared).most_common(1)
        options = next(each for each in declared if tuple(sorted(each)) == space)
    options = options or tuple(sorted({example.output for example in examples}))
    if (again := _twice(options)) is not None:
        raise ConfigError(f"task '{name}': option '{again}' is there twice; remove one")
    if any(not option.strip() for option in options):
        raise ConfigError(f"task '{name}': an option is empty; remove it")
    if len(options) < 2:
        raise ConfigError(
            f"task '{name}': {_some(options)} is its only label, and a classification task needs "
            f"two; give it 'options' or more rows"
        )
    return options


def _twice(options: Sequence[str]) -> str | None:
    return next((option for option, count in Counter(options).items() if count > 1), None)


def _some(options: Sequence[str]) -> str:
    shown = ", ".join(f"'{option}'" for option in options[:6])
    return f"[{shown}, ... {len(options)} in all]" if len(options) > 6 else f"[{shown}]"
