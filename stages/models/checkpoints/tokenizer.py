"""A model folder's tokenizer, opened: what it makes of a text is what its tokenizer.json says.

transformers 5 builds the tokenizers of most classes anew from the vocabulary alone, with the
normaliser and pre-tokenizer of the class that ``tokenizer_config.json`` names. That is often not
the class the file was made by: of a byte-level file under ``LlamaTokenizerFast`` (folders of the
DeepSeek kind) it drops every space. So what was opened is held to ``tokenizers`` on probes; where
they part, the file's own tokenizer is taken, and where that parts from it too, it is refused.

Nothing else opens a tokenizer. transformers is loaded when one is opened, not to plan.
"""

from pathlib import Path
from typing import Any

from schemas.errors import ConfigError, first_line
from stages.models.checkpoints.own_code import open_pretrained
from stages.models.checkpoints.tokenizer_identity import TOKENIZER_JSON, first_tokens

_PROBES = (
    "hello world we need to add",
    "  two blanks in front,  two inside, three behind   ",
    " one in front",
    "lines\nand\n\nmore\r\n\ttabs\t\tand\n  indents\n",
    "1 12 123 1234567 3.14 1,000,000 2026-11-28 x1 1x",
    "déjà vu, naïve, Ünïcödé, ﬁ, e\u0301, ①, \uff26\uff55\uff4c\uff4c",
    "你好\uff0c世界。こんにちは 안녕하세요 Привет мир שלום مرحبا",
    "def f(x: int) -> str:\n    return f'{x!r}' if x else \"\"  # ok\n\n\nprint(f(1))",
    "it's, we'll, I'M, don't; (a) [b] {c} <d> a/b a_b a-b #!? ... \u2014 \u201cq\u201d",
    "\U0001f600 \U0001f469\u200d\U0001f4bb \u00a0\u200b\u3000 \u2581x",
    "UPPER lower CamelCase snake_case http://a.b/c?d=e&f=1",
)
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))


def open_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a model folder as a transformers object, never from the network.

    It neither cuts nor pads unless asked to. Raises ConfigError where it cannot be opened, or where
    it cannot be made to agree with ``tokenizer.json``. A folder without that file is taken as
    transformers opens it.
    """
    from transformers import AutoTokenizer

    has_file = (folder / TOKENIZER_JSON).is_file()
    reference = _as_written(folder) if has_file else None
    try:
        tokenizer: Any = open_pretrained(AutoTokenizer, folder)
    except Exception as error:
        if reference is None or isinstance(error, (OSError, ValueError, KeyError)):
            raise ConfigError(
                f"cannot load the tokenizer of {folder}: {first_line(error)}"
            ) from error
        tokenizer = None  # a class that cannot be built of this file's vocabulary
    if reference is None:
        return tokenizer
    has_its_tokens = tokenizer is not None and len(tokenizer) == reference.get_vocab_size()
    if has_its_tokens and _difference(tokenizer, reference, folder) is None:
        return tokenizer
    own = _own(folder, tokenizer, reference)
    text = _difference(own, reference, folder)
    if text is not None:
        raise ConfigError(
            f"transformers does not open the tokenizer of {folder} as its {TOKENIZER_JSON} says: "
            f"they part on {text!r}; save it anew with the transformers version that made it"
        )
    return own


def _as_written(folder: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return _whole(Tokenizer.from_file(str(folder / TOKENIZER_JSON)))
    except Exception as error:  # tokenizers raises nothing more exact
        raise ConfigError(
            f"{folder / TOKENIZER_JSON} cannot be read: {first_line(error)}"
        ) from error


def _whole(backend: Any) -> Any:
    """Switch off cutting and padding, which a file keeps from its last use."""
    backend.no_truncation()
    backend.no_padding()
    return backend


def _own(folder: Path, tokenizer: Any, reference: Any) -> Any:
    """Return the file's own tokenizer, with the special tokens that the folder's class names."""
    from transformers import PreTrainedTokenizerFast

    own = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    for name in _NAMED if tokenizer is not None else ():
        token = getattr(tokenizer, name)
        if getattr(own, name) is None and reference.token_to_id(token or "") is not None:
            setattr(own, name, token)
    return own


def _text(backend: Any, ids: list[int]) -> str:
    return str(backend.decode(ids, skip_special_tokens=False))


def _difference(tokenizer: Any, reference: Any, folder: Path) -> str | None:
    """Return the first probe of which the two make something else, None where there is none."""
    if not tokenizer.is_fast:
        return _PROBES[0]
    backend = _whole(tokenizer.backend_tokenizer)
    added = [token.content for token in reference.get_added_tokens_decoder().values()]
    for text in (*_PROBES, *(f"a {token} b{token}{token}c\n{token}" for token in added)):
        try:
            found = backend.encode(text, add_special_tokens=False).ids
        except Exception:  # noqa: BLE001  tokenizers raises nothing more exact
            return text
        expected = reference.encode(text, add_special_tokens=False).ids
        if found != expected or _text(backend, found) != _text(reference, expected):
            return text
    whole = backend.encode(_PROBES[0], add_special_tokens=True)
    first = whole.tokens[: [*whole.special_tokens_mask, 0].index(0)]
    is_told = 0 in whole.special_tokens_mask  # else the text has no token in this vocabulary
    return _PROBES[0] if is_told and first != first_tokens(folder) else None
