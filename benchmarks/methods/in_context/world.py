"""A small world of in-context tasks: latent classes of words, and tasks that name classes anew.

A phrase is a filler, which says nothing, and a word of a class. A task draws ``LABELS_A_TASK``
classes and gives each a label: what a phrase's label is stands in the demonstrations alone, which
words belong together can be learned before. In tasks no phrase is used twice, and no assignment of
labels to classes is shared by two tasks. The teacher knows tasks of all classes; students begin
with those of the ``FIRST`` and with running text of the ``READ``, and methods train them on tasks
of the ``KNOWN``. ``NOVEL`` classes are in no task that trains a student, only in running text. All
is drawn from one seed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

CLASSES, WORDS_A_CLASS, LABELS, FILLERS = 12, 8, 8, 120
LABELS_A_TASK = 4
ALL, FIRST, KNOWN, NOVEL = range(CLASSES), range(5), range(8), range(8, CLASSES)
READ = (*FIRST, *NOVEL)
TOKENS = 4  # of an example: filler, word, label, separator
# Of the teacher's corpus: rows that say any tokens again and again, rows of running text, and of
# the rest, episodes, those whose words come again, at half of the examples, and those without
# fillers.
REPETITIONS, TEXTS, BURSTS, BARE = 0.3, 0.1, 0.7, 0.5
SEPARATOR, STOP, END = ";", ".", "</s>"

Task = tuple[tuple[int, int], ...]  # class and label, by class
Rows = list[dict[str, Any]]


def vocabulary() -> dict[str, int]:
    """Return every word of the world with its token id."""
    words = [_word(c, w) for c in range(CLASSES) for w in range(WORDS_A_CLASS)]
    labels = [_label(number) for number in range(LABELS)]
    fillers = [_filler(number) for number in range(FILLERS)]
    names = [END, "<unk>", SEPARATOR, STOP, *words, *labels, *fillers]
    return {name: index for index, name in enumerate(names)}


def save_model(folder: Path, *, width: int, layers: int, seed: int) -> Path:
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
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.65 / width**0.5,  # 0.02 is for wide models: these would start late
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
    _phrases: dict[int, list[str]] = field(init=False, default_factory=dict)  # left, by class
    _tasks: set[Task] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        """Start its one stream of random numbers."""
        self._rng = np.random.default_rng(self.seed)

    def new_tasks(self, count: int, classes: range = KNOWN) -> list[Task]:
        """Return tasks of some of ``classes`` that were never returned before."""
        found: list[Task] = []
        while len(found) < count:
            named = np.sort(self._rng.choice(classes, LABELS_A_TASK, replace=False))
            labels = self._rng.choice(LABELS, LABELS_A_TASK, replace=False)
            task = tuple(zip(named.tolist(), labels.tolist(), strict=True))
            if task not in self._tasks:
                self._tasks.add(task)
                found.append(task)
        return found

    def task_rows(self, tasks: Sequence[Task], name: str, examples: int) -> Rows:
        """Return MetaICL's rows of tasks ``name_0``, ``name_1``, ..., each of so many examples."""
        rows: Rows = []
        for number, task in enumerate(tasks):
            options = [_label(label) for _, label in task]
            for _ in range(examples):
                class_, label = self._drawn(task)
                phrase = self._new_phrase(class_)
                row = {"task": f"{name}_{number}", "input": phrase, "output": _label(label)}
                rows.append({**row, "options": options})
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
        named = self._rng.choice(classes, LABELS_A_TASK, replace=False)
        labels = self._rng.choice(LABELS, LABELS_A_TASK, replace=False)
        again = 0.5 if self._rng.random() < BURSTS else 0.0
        bare = self._rng.random() < BARE
        pairs: list[tuple[str, str]] = []
        said: list[str] = []
        learned: list[int] = []
        while len(said) < length:
            if pairs and self._rng.random() < again:
                pairs.append(pairs[int(self._rng.integers(len(pairs)))])
            else:
                which = int(self._rng.integers(LABELS_A_TASK))
                pairs.append((self._word_of(int(named[which])), _label(int(labels[which]))))
            filler = [] if bare else [self._any_filler()]
            said += [*filler, *pairs[-1], SEPARATOR]
            learned += [0] * (len(filler) + 1) + [1, 0]
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

    def _drawn(self, task: Task) -> tuple[int, int]:
        return task[int(self._rng.integers(len(task)))]

    def _new_phrase(self, class_: int) -> str:
        if class_ not in self._phrases:
            words = [_word(class_, number) for number in range(WORDS_A_CLASS)]
            phrases = [f"{_filler(number)} {word}" for number in range(FILLERS) for word in words]
            self._phrases[class_] = self._rng.permutation(phrases).tolist()
        return self._phrases[class_].pop()

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
