"""A tokenizer whose tokens are known byte by byte: byte-level, or sentencepiece's kind.

Byte-level tokenizers spell each byte as one character (GPT-2's table). Those of sentencepiece's
kind spell a space as U+2581, and with byte fallback a byte as ``<0xNN>``; they put a space before a
text that has none. Neither kind's tokens have to be whole characters.
"""

import json
import re
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.errors import ConfigError
from stages.models.checkpoints.tokenizer import open_tokenizer

IdArray = npt.NDArray[np.int64]
_SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_NO_LIMIT = 10**12  # transformers writes 1e30 where a tokenizer states no maximum


class UnknownBytes(ValueError):
    """A text or a token whose bytes are not known exactly; the message says why."""


class ByteTokenizer:
    """The tokenizer of a model folder, and the bytes of each of its tokens.

    ``bytes_of`` has them by id; special tokens have none and are not in it. ``special`` spells
    those, and ``named`` has the ids of those called ``bos``, ``eos`` and ``pad``. Raises
    ConfigError for a tokenizer of another kind (WordPiece, say).
    """

    def __init__(self, folder: Path) -> None:
        """Open the tokenizer, never going to the network."""
        tokenizer = open_tokenizer(folder)
        if not tokenizer.is_fast:
            raise ConfigError(f"tokenizer: {folder} has no fast tokenizer (tokenizer.json)")
        self.folder = folder
        roles = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
        self.named: dict[str, int] = {role: i for role, i in roles.items() if i is not None}
        self.max_length = min(int(tokenizer.model_max_length), _NO_LIMIT)
        self._backend = tokenizer.backend_tokenizer
        self._backend.encode_special_tokens = True  # text that spells one is text
        body = json.loads(self._backend.to_str())
        self.special: dict[int, str] = {
            t["id"]: t["content"] for t in body["added_tokens"] if t["special"]
        }
        spelled = _speller(body, folder)
        self.bytes_of: dict[int, bytes] = {}
        for token, index in _pieces(body["model"]):
            if (found := spelled(token)) is not None and token != _unknown(body["model"]):
                self.bytes_of[index] = found
        for added in body["added_tokens"]:
            self.bytes_of.pop(added["id"], None)
            if not added["special"]:
                self.bytes_of[added["id"]] = added["content"].encode()

    @property
    def prepends(self) -> bool:
        """Whether it puts a space before a text."""
        found = self._backend.encode("a", add_special_tokens=False).ids
        return b"".join(self.bytes_of.get(index, b"") for index in found) == b" a"

    @property
    def prefix_ids(self) -> list[int]:
        """The special tokens that it puts before a text: a BOS, or none."""
        encoding = self._backend.encode("a", add_special_tokens=True)
        is_text = [not special for special in encoding.special_tokens_mask]
        return list(encoding.ids[: is_text.index(True)])

    def encode(self, text: bytes) -> tuple[IdArray, IdArray]:
        """Return the ids of a text in UTF-8, and how many of its bytes each of them is.

        The space that is put before a text counts as none of its bytes. Raises UnknownBytes where
        the tokens are not the text: it was changed, or has what no token is for.
        """
        ids = self._backend.encode(text.decode(), add_special_tokens=False).ids
        unknown = next((index for index in ids if index not in self.bytes_of), None)
        if unknown is not None:
            raise UnknownBytes(f"the student's tokenizer has {self.spelling(unknown)} for a part")
        parts = [self.bytes_of[index] for index in ids]
        sizes = np.array([len(part) for part in parts], np.int64)
        joined = b"".join(parts)
        if joined == b" " + text:
            sizes[0] -= 1
        elif joined != text:
            raise UnknownBytes("the student's tokenizer changes the text")
        return np.array(ids, np.int64), sizes

    def begin_of(self, part: bytes) -> int | None:
        """Return the token that a text goes on with where it goes on with ``part``, alone.

        None where that is not known: bytes that are no text, or that the tokenizer changes. A
        tokenizer that puts a space before a text is asked behind a line break.
        """
        try:
            text = part.decode()
        except UnicodeDecodeError:
            return None
        for before, asked in (("", text), ("", text.removeprefix(" ")), (" \n", "\n" + text)):
            ids = self._backend.encode(asked, add_special_tokens=False).ids
            parts = [self.bytes_of.get(index, b"") for index in ids]
            starts = [0, *accumulate(map(len, parts))]
            if b"".join(parts) == before.encode() + part and len(before) in starts[:-1]:
                return int(ids[starts.index(len(before))])
        return None

    def spelling(self, index: int) -> str:
        """Return how a token is spelled, for people."""
        return self._backend.id_to_token(index) or f"id {index}"


def _pieces(model: dict[str, Any]) -> Iterator[tuple[str, int]]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    else:
        yield from ((piece, index) for index, (piece, _) in enumerate(vocabulary))


def _unknown(model: dict[str, Any]) -> str | None:
    """Return the token that stands for whatever has none."""
    if (index := model.get("unk_id")) is not None:
        return str(model["vocab"][index][0])
    token: str | None = model.get("unk_token")
    return token


def _speller(body: dict[str, Any], folder: Path) -> Callable[[str], bytes | None]:
    """Return what spells a token as bytes; raises ConfigError for a kind that is not known."""
    decoders = list(_parts(body.get("decoder")))
    kinds = {part["type"] for part in decoders}
    if "ByteLevel" in kinds:
        return _byte_level
    replaced = {"Replace", "Metaspace"} & kinds
    if replaced and body["model"]["type"] in ("BPE", "Unigram"):
        has_bytes = "ByteFallback" in kinds or body["model"].get("byte_fallback")
        return _with_bytes if has_bytes else _spaced
    raise ConfigError(
        f"the tokenizer in {folder} is neither byte-level nor of sentencepiece's kind "
        f"({body['model']['type']}, decoder {', '.join(sorted(kinds)) or 'none'}): the bytes of "
        f"its tokens are not known"
    )


def _parts(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if decoder is not None and decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _parts(part)
    elif decoder is not None:
        yield decoder


def _alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + number): byte for number, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


_ALPHABET = _alphabet()


def _byte_level(token: str) -> bytes | None:
    if any(character not in _ALPHABET for character in token):
        return None
    return bytes(_ALPHABET[character] for character in token)


def _spaced(token: str) -> bytes:
    return token.replace(_SPACE, " ").encode()


def _with_bytes(token: str) -> bytes:
    found = _BYTE.fullmatch(token)
    return bytes([int(found[1], 16)]) if found else _spaced(token)
