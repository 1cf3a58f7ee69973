"""The bytes of tokens: end to end they are the text, whatever the text, or the text is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from tokenizers import Tokenizer, models, pre_tokenizers

from schemas.errors import ConfigError
from stages.models.checkpoints.token_bytes import ByteTokenizer, UnknownBytes
from tests.fixtures.odd_texts import ODD, odd_texts
from tests.fixtures.tokenizer_kinds import BOS, EOS, save_kind

EXACT = ("byte_level", "digit_by_digit", "metaspace", "prepended", "always_prefixed", "replaced")
PREPENDING = ("metaspace", "prepended", "always_prefixed")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ByteTokenizer]:
    root = tmp_path_factory.mktemp("kinds")
    kinds = (*EXACT, "composed")
    return {
        kind: ByteTokenizer(save_kind(root / kind, kind, "PreTrainedTokenizerFast"))
        for kind in kinds
    }


def joined(tokenizer: ByteTokenizer, ids: np.ndarray) -> bytes:
    return b"".join(tokenizer.bytes_of[int(index)] for index in ids)


@pytest.mark.parametrize("kind", EXACT)
@given(text=odd_texts())
@settings(max_examples=60, deadline=None)
def test_tokens_end_to_end_are_the_text(
    tokenizers: dict[str, ByteTokenizer], kind: str, text: str
) -> None:
    """Sentencepiece spells a space as U+2581 and cannot tell that character from it."""
    tokenizer, data = tokenizers[kind], text.encode()
    if "\u2581" in text and not kind.endswith(("level", "digit")):
        with pytest.raises(UnknownBytes, match="changes the text"):
            tokenizer.encode(data)
        return
    ids, sizes = tokenizer.encode(data)
    assert int(sizes.sum()) == len(data)
    extra = joined(tokenizer, ids).removesuffix(data)
    assert extra == b"" or (kind in PREPENDING and extra == b" ")


@pytest.mark.parametrize("kind", EXACT)
@given(text=odd_texts())
@settings(max_examples=40, deadline=None)
def test_the_begin_of_a_text_is_the_token_behind_what_is_before_it(
    tokenizers: dict[str, ByteTokenizer], kind: str, text: str
) -> None:
    """Before it stands a line break and a space, which no token here crosses."""
    tokenizer, part = tokenizers[kind], b" x" + text.encode()
    if "\u2581" in text and not kind.endswith(("level", "digit")):
        assert tokenizer.begin_of(part) is None
        return
    ids, sizes = tokenizer.encode(b"we\n" + part)
    at = (np.cumsum(sizes) - sizes).tolist().index(3)
    assert tokenizer.begin_of(part) == ids[at]


@pytest.mark.parametrize("kind", EXACT)
def test_a_token_begins_with_itself_where_it_is_how_its_text_is_split(
    tokenizers: dict[str, ByteTokenizer], kind: str
) -> None:
    """In the middle of a word, too, where those that put a space before a text are asked."""
    tokenizer = tokenizers[kind]
    found = 0
    for index, part in tokenizer.bytes_of.items():
        begin = tokenizer.begin_of(part)
        assert begin is None or part.startswith(tokenizer.bytes_of[begin])
        found += begin == index
    assert found > 0.7 * len([p for p in tokenizer.bytes_of.values() if p.isascii()])
    assert tokenizer.begin_of(b"\xe2\x96") is None and tokenizer.begin_of(b"") is None
    assert tokenizer.begin_of(b"eed to") == tokenizer.begin_of(b"eed")


@pytest.mark.parametrize("kind", EXACT)
def test_bytes_of_a_token_are_what_the_library_decodes(
    tokenizers: dict[str, ByteTokenizer], kind: str
) -> None:
    """The library's own decoder, asked about each token between two others that it keeps whole."""
    tokenizer = tokenizers[kind]
    backend = Tokenizer.from_file(str(tokenizer.folder / "tokenizer.json"))
    around = next(i for i, part in tokenizer.bytes_of.items() if part == b"x")
    compared = 0
    for index, part in tokenizer.bytes_of.items():
        found = backend.decode([around, index, around], skip_special_tokens=False)
        if "\ufffd" not in found:
            assert found.encode() == b"x" + part + b"x", part
            compared += 1
    assert compared > 100
    assert {BOS, EOS} <= set(tokenizer.special.values())
    assert not set(tokenizer.special) & set(tokenizer.bytes_of)


@pytest.mark.parametrize("kind", EXACT)
def test_text_that_spells_a_special_token_is_text(
    tokenizers: dict[str, ByteTokenizer], kind: str
) -> None:
    tokenizer, text = tokenizers[kind], f"a {EOS} b{BOS}".encode()
    ids, _ = tokenizer.encode(text)
    assert joined(tokenizer, ids).removeprefix(b" ") == text


@pytest.mark.parametrize("kind", EXACT)
def test_who_puts_a_space_before_a_text(tokenizers: dict[str, ByteTokenizer], kind: str) -> None:
    assert tokenizers[kind].prepends == (kind in PREPENDING)


def test_a_tokenizer_that_changes_text_says_so(tokenizers: dict[str, ByteTokenizer]) -> None:
    tokenizer = tokenizers["composed"]
    tokenizer.encode("d\u00e9j\u00e0".encode())
    with pytest.raises(UnknownBytes, match="changes the text"):
        tokenizer.encode("de\u0301".encode())


def test_what_has_no_token_is_said(tmp_path: Path) -> None:
    """Sentencepiece without byte fallback: an unknown character is no text of its own."""
    folder = save_kind(tmp_path, "metaspace", "PreTrainedTokenizerFast")
    path = folder / "tokenizer.json"
    body = json.loads(path.read_text())
    body["model"]["byte_fallback"] = False
    path.write_text(json.dumps(body))
    with pytest.raises(UnknownBytes, match="has <unk> for a part"):
        ByteTokenizer(folder).encode("hello \u65e5".encode())


def test_another_kind_is_refused_in_one_line(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 2}))
    with pytest.raises(ConfigError, match=r"neither byte-level nor .* \(WordLevel, decoder none\)"):
        ByteTokenizer(tmp_path)


def test_odd_texts_are_odd() -> None:
    assert any("\r\n" in text for text in ODD) and any("\x00" in text for text in ODD)
