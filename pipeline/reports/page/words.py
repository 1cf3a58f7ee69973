"""Token ids as pieces of text that, end to end, are what the tokenizer makes of all of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.planning.plan import PlannedStep
from stages.models.checkpoints.checkpoint import local_copy
from stages.models.checkpoints.tokenizer import open_tokenizer
from stages.models.checkpoints.tokenizer_identity import tokenizer_fingerprint
from stages.stage import SourceStage

_CONTEXT = 6  # tokens before one that its text may depend on: spaces, characters of several bytes
_BROKEN = "\ufffd"  # what bytes that make no whole character are decoded to


class Words:
    """Text of token ids by one tokenizer; without one, the ids themselves."""

    def __init__(self, tokenizer: Any | None) -> None:
        """Remember the text of each id that is asked for alone."""
        self._tokenizer = tokenizer
        self._alone: dict[int, str] = {}
        self._before = self._letter() if tokenizer is not None else []

    @property
    def has_text(self) -> bool:
        """Whether there is a tokenizer."""
        return self._tokenizer is not None

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens, special ones too."""
        if self._tokenizer is None:
            return "".join(f"{token} " for token in ids)
        decoded = self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(decoded)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text that each token adds to those before it.

        A character of several tokens is the last one's; the others have no text.
        """
        if self._tokenizer is None:
            return [f"{token} " for token in ids]
        found, start = [], 0  # ``start``: from here on text is not all told yet
        for at in range(len(ids)):
            first = max(min(start, at - _CONTEXT), 0)
            before, now = self.text(ids[first:start]), self.text(ids[first : at + 1])
            if now.endswith(_BROKEN) and at - start < _CONTEXT and at + 1 < len(ids):
                found.append("")
                continue
            found.append(now[len(before) :] if now.startswith(before) else self.alone(ids[at]))
            start = at + 1
        return found

    def alone(self, token: int) -> str:
        """Return the text of a token behind a letter, so that a space that begins it is there."""
        if token not in self._alone:
            before, text = self.text(self._before), self.text([*self._before, token])
            is_behind = bool(self._before) and text.startswith(before)
            self._alone[token] = text[len(before) :] if is_behind else self.text([token])
        return self._alone[token]

    def _letter(self) -> list[int]:
        """Return the first token that is one ASCII letter, if there is any."""
        for token in range(min(2000, len(self._tokenizer or ()))):
            text = self.text([token])
            if len(text) == 1 and text.isascii() and text.isalpha():
                return [token]
        return []


class Tokenizers:
    """The tokenizers of a plan's tables, each opened once."""

    def __init__(self, steps: Sequence[PlannedStep] = ()) -> None:
        """Begin with none; ``steps`` are those that may know a table's tokenizer for another."""
        self._steps = steps
        self._opened: dict[str, Words] = {}

    def words_of(self, step: PlannedStep) -> Words:
        """Return what a table's ids mean; ids alone where no folder of the plan has its tokenizer.

        Raises ConfigError where the tokenizer cannot be opened.
        """
        found = self._opened.get(step.vocabulary)
        if found is None:
            alike = [other for other in self._steps if other.vocabulary == step.vocabulary]
            opened = map(self._open, [step, *alike])
            found = Words(next((one for one in opened if one is not None), None))
            self._opened[step.vocabulary] = found
        return found

    def _open(self, step: PlannedStep) -> Any | None:
        if isinstance(step.stage, SourceStage):
            folder = Path(step.stage.tokenizer)
            tokenizer_fingerprint(folder)  # raises ConfigError where there is none
            return open_tokenizer(folder)
        for model in step.models.values():
            if model.vocabulary == step.vocabulary:
                return open_tokenizer(local_copy(model.base))
        return next((self._open(source) for source in step.inputs), None)
