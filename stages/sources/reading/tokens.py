"""Texts -> token ids with a model's own fast tokenizer, and what that model allows.

No special token is added unasked. Text that spells one (``<|im_end|>``) becomes that token, as
everywhere in transformers; ids at or above the model's vocabulary are reported, never kept.

Cost: 1.5 MB of English a CPU second (SmolLM2's tokenizer, 2026-11); all cores are used.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from schemas.errors import ConfigError
from stages.models.checkpoints.chat_template import ChatTemplate
from stages.models.checkpoints.rotary_scaling import ONE_SET, fixed_window
from stages.models.checkpoints.tokenizer import open_tokenizer
from stages.models.checkpoints.tokenizer_identity import stated_end

IdArray = npt.NDArray[np.uint32]
_BREAK = "\n"
_NO_LIMIT = 10**12  # transformers writes 1e30 where a tokenizer states no maximum


class TextTokenizer:
    """A tokenizer folder, opened; raises ConfigError when it cannot serve."""

    def __init__(self, folder: Path) -> None:
        """Open the tokenizer of a model folder, never going to the network."""
        if not folder.is_dir():
            raise ConfigError(f"tokenizer: {folder} is not a folder; give a model folder's path")
        tokenizer = open_tokenizer(folder)
        if not tokenizer.is_fast:
            raise ConfigError(f"tokenizer: {folder} has no fast tokenizer (tokenizer.json)")
        self.folder = folder
        self.vocab_size, self.max_length = model_limits(folder, len(tokenizer))
        self.max_length = min(self.max_length, int(tokenizer.model_max_length))
        self._fixed_window = fixed_window(_config_of(folder))
        self.eos_id: int | None = tokenizer.eos_token_id
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        alone, inside = self.encode(["a", f"{_BREAK}a"])
        self._prepends = alone.tolist() != inside[-len(alone) :].tolist()

    def require(self, *, length: int, eos: bool, setting: str = "length") -> None:
        """Raise ConfigError when rows of ``length`` tokens (parted by an EOS) cannot be made."""
        if length > self.max_length:
            why = f"; {ONE_SET}" if self.max_length == self._fixed_window else ""
            raise ConfigError(
                f"{setting}: got {length}, but the model in {self.folder} takes at most "
                f"{self.max_length} tokens{why}"
            )
        if eos and self.eos_id is None:
            raise ConfigError(
                f"mode: pack parts documents with the end-of-sequence token, and the tokenizer in "
                f"{self.folder} has none; set its eos_token, or use mode: truncate"
            )

    def encode(self, texts: Sequence[str]) -> list[IdArray]:
        """Return the ids of each text, without special tokens."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    @property
    def special_texts(self) -> tuple[str, ...]:
        """How all special tokens are spelled, the longest first."""
        added = self._backend.get_added_tokens_decoder().values()
        texts = {token.content for token in added if token.special}
        texts.update(self._tokenizer.all_special_tokens)
        return tuple(sorted(filter(None, texts), key=lambda text: (-len(text), text)))

    def chat_template(self, settings: Mapping[str, Any]) -> ChatTemplate:
        """Return the tokenizer's chat template, to be written with ``settings``."""
        return ChatTemplate(self._tokenizer, settings)

    def split_special_tokens(self) -> frozenset[str]:
        """From now on encode what spells a special token as any other text.

        Returns those that the tokenizer makes of their spelling all the same.
        """
        self._backend.encode_special_tokens = True
        texts = self.special_texts
        found = zip(texts, self.encode(texts), strict=True)
        return frozenset(text for text, ids in found if self._backend.token_to_id(text) in ids)

    @property
    def prefix_ids(self) -> IdArray:
        """The special tokens that the tokenizer itself puts before a text: a BOS, or none."""
        encoding = self._backend.encode("a", add_special_tokens=True)
        is_text = [not special for special in encoding.special_tokens_mask]
        return np.array(encoding.ids[: is_text.index(True)], np.uint32)

    def first_ids(self, bos: Literal["tokenizer", "always", "never"]) -> IdArray:
        """Return what a row begins with: ``prefix_ids``, the BOS token, or nothing.

        Raises ConfigError where a BOS is asked for and there is none, or the model has no such id.
        """
        ids = {"tokenizer": self.prefix_ids, "never": self.prefix_ids[:0]}.get(bos)
        if ids is None:
            found = self._tokenizer.bos_token_id
            if found is None:
                raise ConfigError(
                    f"bos: always, but the tokenizer in {self.folder} has no beginning-of-sequence "
                    f"token; set its bos_token, or use bos: never"
                )
            ids = np.array([found], np.uint32)
        if max(ids, default=0) >= self.vocab_size:
            raise ConfigError(
                f"bos: rows would begin with token {int(max(ids))}, but the model in {self.folder} "
                f"has a vocabulary of {self.vocab_size}; use bos: never"
            )
        return ids

    def encode_part(self, text: str) -> IdArray:
        """Return the ids of a text that stands somewhere inside a longer one.

        Sentencepiece tokenizers put a space before every text: such a one is given a line break
        and then the text, and the line break's tokens are dropped.
        """
        if not self._prepends:
            return self.encode([text])[0]
        return self._ids_within(_BREAK + text, len(_BREAK), len(_BREAK) + len(text))

    def encode_separator(self, separator: str) -> IdArray:
        """Return the ids of ``separator`` as it stands between two texts.

        Raises ConfigError when the tokenizer joins it with either of them.
        """
        return self._ids_within(f"a{separator}a", 1, 1 + len(separator))

    def _ids_within(self, text: str, start: int, stop: int) -> IdArray:
        """Return the tokens of characters ``start`` to ``stop``, cut off cleanly on both sides.

        White space of which a tokenizer makes no token, as T5's does, counts as nothing.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        spans = list(zip(encoding.ids, encoding.offsets, strict=True))
        inside = [(i, a, b) for i, (a, b) in spans if a >= start and b <= stop and a < b]
        outside = sum(b <= start or a >= stop for _, (a, b) in spans)
        if not inside and outside == len(spans):
            raise ConfigError(
                f"the tokenizer in {self.folder} makes no token of {text[start:stop]!r}: use a "
                f"separator with one of its own, such as ' ; '"
            )
        around = [text[start : inside[0][1]], text[inside[-1][2] : stop]] if inside else ["?"]
        if "".join(around).strip() or outside + len(inside) != len(spans):
            raise ConfigError(
                f"the tokenizer in {self.folder} joins {text[start:stop]!r} with what stands "
                f"beside it; use one that ends in a newline"
            )
        return np.array([i for i, _, _ in inside], np.uint32)


def packing_end(folder: Path, *, length: int) -> int:
    """Return the id that parts documents in rows of ``length``; raises as ``require`` does.

    The tokenizer is opened only where the folder's files do not state the id: ids alone are packed,
    and opening one costs as much as reading millions of them.
    """
    if folder.is_dir() and length <= model_limits(folder, 0)[1]:
        stated = stated_end(folder, length=length)
        if stated is not None:
            return stated
    tokenizer = TextTokenizer(folder)
    tokenizer.require(length=length, eos=True)
    assert tokenizer.eos_id is not None
    return tokenizer.eos_id


def _config_of(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def model_limits(folder: Path, tokenizer_size: int) -> tuple[int, int]:
    """Return vocabulary size and maximum length by ``config.json``, as far as it is there."""
    config = _config_of(folder)
    text_config = config.get("text_config") or config
    vocab_size = text_config.get("vocab_size") or tokenizer_size
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    limits = [int(text_config[name]) for name in names if text_config.get(name)]
    if (window := fixed_window(config)) is not None:
        limits.append(window)
    return int(vocab_size), min(limits, default=_NO_LIMIT)
