"""A small world of in-context tasks: latent classes of words, and tasks that name patterns anew.

A phrase is two words: each of some class, or a filler, which says nothing. A task draws
``LABELS_A_TASK`` patterns of phrases and gives each a label: what a phrase's label is stands in the
demonstrations alone, which words belong together can be learned before. Tasks are of three kinds:

- ``maps``: four classes, after a filler;
- ``relations``: two classes, one or both of them, in either place;
- ``orders``: two classes, each before a filler or after one.

In a task no phrase comes twice, and no two tasks of the files give the same labels to the same
patterns; no episode of a corpus has a task of the files drawn before it. The teacher knows tasks of
all classes; students begin with those of the ``FIRST`` and with running text of the ``READ``, and
methods train them on tasks of the ``KNOWN``. ``NOVEL`` classes are in no task that trains a
student, only in running text. All is drawn from one seed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

CLASSES, WORDS_A_CLASS, LABELS, FILLERS = 12, 8, 8, 120
LABELS_A_TASK = 4
ALL, FIRST, KNOWN, NOVEL = range(CLASSES), range(5), range(8), range(8, CLASSES)
READ = (*FIRST, *NOVEL)
KINDS = {"maps": 0.5, "relations": 0.25, "orders": 0.25}  # and their shares of a corpus
TOKENS = 4  # of an example: filler, word, label, separator
# Of the teacher's corpus: rows that say any tokens again and again, rows of running text, and of
# the rest, episodes, those whose words come again, at half of the examples, and those without
# fillers.
REPETITIONS, TEXTS, BURSTS, BARE = 0.3, 0.1, 0.7, 0.5
SEPARATOR, STOP, END = ";", ".", "</s>"

Pattern = tuple[int | None, int | None]  # the classes of a phrase's two words; None: a filler
Task = tuple[tuple[Pattern, int], ...]  # each of its patterns, and the number of its label
Rows = list[dict[str, Any]]


def vocabulary() -> dict[str, int]:
    """Return every word of the world with its token id."""
    words = [_word(c, w) for c in range(CLASSES) for w in range(WORDS_A_CLASS)]
    labels = [_label(number) for number in range(LABELS)]
    fillers = [_filler(number) for number in range(FILLERS)]
    names = [END, "<unk>", SEPARATOR, STOP, *words, *labels, *fillers]
    return {name: index for index, name in enumerate(names)}


@dataclass(frozen=True, slots=True)
class Shape:
    """How large a model is."""

    width: int
    layers: int
    heads: int
    intermediate: int


def save_model(folder: Path, shape: Shape, *, seed: int) -> Path:
    """Save a random Llama with the world's tokenizer, one token a word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    end = vocabulary()[END]
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=512,
        initializer_range=0.65
        / shape.width**0.5,  # 0.02 is for wide models: these would start late
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@dataclass(slots=True)
class World:
    """Draws examples, tasks and text."""

    seed: int
    _rng: np.random.Generator = field(init=False)
    _tasks: set[Task] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        """Start its one stream of random numbers."""
        self._rng = np.random.default_rng(self.seed)

    def new_tasks(self, count: int, classes: range = KNOWN) -> dict[str, list[Task]]:
        """Return so many tasks of each kind, of some of ``classes``, never returned before."""
        return {kind: [self._new_task(kind, classes) for _ in range(count)] for kind in KINDS}

    def _new_task(self, kind: str, classes: range) -> Task:
        task = self._unseen_task(kind, classes)
        self._tasks.add(task)
        return task

    def _unseen_task(self, kind: str, classes: range) -> Task:
        while (task := self._task(kind, classes)) in self._tasks:
            pass
        return task

    def _task(self, kind: str, classes: range) -> Task:
        count = LABELS_A_TASK if kind == "maps" else 2
        named: list[int] = np.sort(self._rng.choice(classes, count, replace=False)).tolist()
        patterns: list[Pattern] = [(None, class_) for class_ in named]
        if kind == "relations":
            patterns = [(first, second) for first in named for second in named]
        elif kind == "orders":
            patterns += [(class_, None) for class_ in named]
        labels = self._rng.choice(LABELS, LABELS_A_TASK, replace=False)
        return tuple(zip(patterns, labels.tolist(), strict=True))

    def task_rows(self, tasks: Mapping[str, Sequence[Task]], name: str, examples: int) -> Rows:
        """Return MetaICL's rows of tasks ``name_kind_0``, ..., each of so many examples."""
        rows: Rows = []
        for kind, of_kind in tasks.items():
            for number, task in enumerate(of_kind):
                options = [_label(label) for _, label in task]
                said: set[str] = set()
                while len(said) < examples:
                    pattern, label = self._drawn(task)
                    phrase = " ".join(self._said(pattern))
                    if phrase in said:
                        continue
                    said.add(phrase)
                    row = {"task": f"{name}_{kind}_{number}", "input": phrase}
                    rows.append({**row, "output": _label(label), "options": options})
        return rows

    def with_wrong_answers(self, rows: Rows, share: float) -> Rows:
        """Return the rows, each with this probability with another of its options as its answer."""
        found: Rows = []
        for row in rows:
            others = [option for option in row["options"] if option != row["output"]]
            wrong = self._rng.random() < share
            found.append(row | ({"output": str(self._rng.choice(others))} if wrong else {}))
        return found

    def corpus(
        self, count: int, length: int, classes: range, read: Sequence[int]
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Yield rows of ``length`` ids, each with its mask of what is learned first.

        Episodes are of ``classes``, running text is of those that are ``read``.

        A model looks back for a label only once it repeats what it has seen: so some rows repeat
        any tokens, and of episodes nothing but the labels is learned, as all else is drawn anew.
        """
        ids = vocabulary()
        for _ in range(count):
            kind = self._rng.random()
            if kind < REPETITIONS:
                period = int(self._rng.integers(8, length // 2))
                once = self._rng.integers(2, len(ids), size=period)
                yield np.resize(once, length).tolist(), [1] * length
            elif kind < REPETITIONS + TEXTS:
                text: list[str] = []
                while len(text) < length:
                    text += self._sentence(read)
                yield [ids[word] for word in text[:length]], [1] * length
            else:
                words, learned = self._episode(length, classes)
                yield [ids[word] for word in words], learned

    def _episode(self, length: int, classes: range) -> tuple[list[str], list[int]]:
        """Return so many words of one task's examples, and which of them are labels."""
        kind = str(self._rng.choice(list(KINDS), p=list(KINDS.values())))
        task = self._unseen_task(kind, classes)
        again = 0.5 if self._rng.random() < BURSTS else 0.0
        bare = kind == "maps" and self._rng.random() < BARE
        shown: list[tuple[list[str], int]] = []
        said: list[str] = []
        learned: list[int] = []
        while len(said) < length:
            if shown and self._rng.random() < again:
                shown.append(shown[int(self._rng.integers(len(shown)))])
            else:
                pattern, label = self._drawn(task)
                shown.append((self._said(pattern), label))
            phrase, label = shown[-1]
            if kind == "maps":
                phrase = phrase[1:] if bare else [self._any_filler(), phrase[1]]
            said += [*phrase, _label(label), SEPARATOR]
            learned += [0] * len(phrase) + [1, 0]
        return said[:length], learned[:length]

    def sentences(self, count: int, words: int) -> Iterator[str]:
        """Yield running text: sentences of a filler and words of one class, about ``words``."""
        for _ in range(count):
            text: list[str] = []
            while len(text) < words:
                text += self._sentence(ALL)
            yield " ".join(text)

    def _sentence(self, classes: Sequence[int]) -> list[str]:
        class_ = int(self._rng.choice(classes))
        words = [self._word_of(class_) for _ in range(self._rng.integers(3, 8))]
        return [self._any_filler(), *words, STOP]

    def _drawn(self, task: Task) -> tuple[Pattern, int]:
        return task[int(self._rng.integers(len(task)))]

    def _said(self, pattern: Pattern) -> list[str]:
        return [
            self._any_filler() if class_ is None else self._word_of(class_) for class_ in pattern
        ]

    def _word_of(self, class_: int) -> str:
        return _word(class_, int(self._rng.integers(WORDS_A_CLASS)))

    def _any_filler(self) -> str:
        return _filler(int(self._rng.integers(FILLERS)))


def write_corpus(path: Path, rows: Iterator[tuple[list[int], list[int]]]) -> None:
    """Write a Parquet of ``input_ids`` and ``learned``."""
    import pyarrow as pa
    from pyarrow import parquet

    ids, learned = zip(*rows, strict=True)
    parquet.write_table(pa.table({"input_ids": list(ids), "learned": list(learned)}), path)


def _word(class_: int, number: int) -> str:
    return f"{chr(ord('a') + class_)}{number}"


def _label(number: int) -> str:
    return f"label{number}"


def _filler(number: int) -> str:
    return f"filler{number}"
