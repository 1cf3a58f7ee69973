"""A small world of in-context tasks: latent classes of words, and tasks that name classes anew.

A phrase is a filler, which says nothing, and a word of a class. A task draws ``LABELS_A_TASK``
classes and gives each a label: what a phrase's label is stands in the demonstrations alone, which
words belong together can be learned before. In tasks no phrase is used twice, and no assignment of
labels to classes is shared by two tasks or with the teacher's corpus. All is drawn from one seed.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

CLASSES, WORDS_A_CLASS, LABELS, FILLERS = 6, 8, 8, 150
LABELS_A_TASK = 4
TOKENS = 4  # of an example: filler, word, label, separator
REPEATED = 0.3  # of a corpus episode's examples, the word of an earlier one
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
    _phrases: set[str] = field(init=False, default_factory=set)
    _tasks: set[Task] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        """Start its one stream of random numbers."""
        self._rng = np.random.default_rng(self.seed)

    def new_tasks(self, count: int) -> list[Task]:
        """Return tasks that were never returned before."""
        found: list[Task] = []
        while len(found) < count:
            classes = np.sort(self._rng.choice(CLASSES, LABELS_A_TASK, replace=False))
            labels = self._rng.choice(LABELS, LABELS_A_TASK, replace=False)
            task = tuple(zip(classes.tolist(), labels.tolist(), strict=True))
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

    def episodes(self, tasks: Sequence[Task], examples: int) -> Iterator[str]:
        """Yield for each task one long text of examples, to be trained on at every token.

        Words come again within a text, which is what a model first learns to look back by.
        """
        for task in tasks:
            pairs: list[tuple[str, str]] = []
            for _ in range(examples):
                if pairs and self._rng.random() < REPEATED:
                    pairs.append(pairs[int(self._rng.integers(len(pairs)))])
                    continue
                class_, label = self._drawn(task)
                pairs.append((self._word_of(class_), _label(label)))
            said = (f"{self._any_filler()} {word} {label}" for word, label in pairs)
            yield f" {SEPARATOR} ".join(said)

    def sentences(self, count: int, words: int) -> Iterator[str]:
        """Yield running text: sentences of a filler and words of one class, about ``words``."""
        for _ in range(count):
            text: list[str] = []
            while len(text) < words:
                text += self._sentence()
            yield " ".join(text)

    def repetitions(self, count: int, words: int) -> Iterator[str]:
        """Yield texts that say 10 to 39 words again and again, about ``words`` in all.

        Half of them are words of running text, half any words.
        """
        names = list(vocabulary())[2:]
        for _ in range(count):
            length = int(self._rng.integers(10, 40))
            said: list[str] = []
            if self._rng.random() < 0.5:
                said = [names[int(place)] for place in self._rng.integers(len(names), size=length)]
            while len(said) < length:
                said += self._sentence()
            yield " ".join((said[:length] * (words // length + 1))[:words])

    def _sentence(self) -> list[str]:
        class_ = int(self._rng.integers(CLASSES))
        words = [self._word_of(class_) for _ in range(self._rng.integers(3, 8))]
        return [self._any_filler(), *words, STOP]

    def _drawn(self, task: Task) -> tuple[int, int]:
        return task[int(self._rng.integers(len(task)))]

    def _new_phrase(self, class_: int) -> str:
        while True:
            phrase = f"{self._any_filler()} {self._word_of(class_)}"
            if phrase not in self._phrases:
                self._phrases.add(phrase)
                return phrase

    def _word_of(self, class_: int) -> str:
        return _word(class_, int(self._rng.integers(WORDS_A_CLASS)))

    def _any_filler(self) -> str:
        return _filler(int(self._rng.integers(FILLERS)))


def write_texts(path: Path, texts: Iterator[str]) -> None:
    """Write a jsonl of ``text``."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_rows(path: Path, rows: Rows) -> None:
    """Write a jsonl of tasks' examples."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _word(class_: int, number: int) -> str:
    return f"{chr(ord('a') + class_)}{number}"


def _label(number: int) -> str:
    return f"label{number}"


def _filler(number: int) -> str:
    return f"filler{number}"
