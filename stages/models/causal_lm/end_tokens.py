"""Which tokens end a text and which a response, by a model's folder.

An end of text by ``config.json`` or the tokenizer, and the token that closes the assistant's turn
in the chat template: a base model's tokenizer often ends texts with another one, and a student
trained on turns would then talk on past the end of its own.

All three are part of a model's identity. ``generation_config.json`` is not, so what it alone names
is not used: a folder that names more there is refused, and the recipe has to say which it means.
"""

import json
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from schemas.errors import ConfigError
from stages.models.causal_lm.language_head import read_config

_GENERATION_CONFIG = "generation_config.json"
_ANSWER = "0123456789"


def stop_tokens_of(folder: Path) -> tuple[int, ...]:
    """Return the ids that end a response, lowest first.

    Raises ConfigError where the folder names none, or more in ``generation_config.json``.
    """
    tokenizer = load_tokenizer(folder)
    config = read_config(folder).get_text_config()
    found = {*end_tokens(config, tokenizer)}
    found |= _end_of_turn(tokenizer, folder)
    if not found:
        raise ConfigError(
            f"{folder} names no token that ends a text, in config.json, tokenizer or chat "
            f"template: give stop_token_ids in the recipe"
        )
    others = _of_generation_config(folder) - found
    if others:
        raise ConfigError(
            f"{folder}/{_GENERATION_CONFIG} ends texts with {sorted(others)}, config.json, "
            f"tokenizer and chat template with {sorted(found)}: say which in stop_token_ids, as "
            f"that file is no part of the model's identity"
        )
    return tuple(sorted(found))


def _ids(value: Any) -> set[int]:
    if value is None:
        return set()
    return {int(token) for token in (value if isinstance(value, list) else [value])}


def _end_of_turn(tokenizer: Any, folder: Path) -> set[int]:
    """Return the first token of its own kind that the template puts behind an answer."""
    if not tokenizer.chat_template:
        return set()
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError as error:
        raise ConfigError(
            f"the chat template of {folder} fails on a question and an answer ({error}): correct "
            f"it, or give stop_token_ids in the recipe"
        ) from error
    behind = tokenizer.encode(text.rpartition(_ANSWER)[2], add_special_tokens=False)
    added = set(tokenizer.added_tokens_decoder)
    return set([token for token in behind if token in added][:1])


def _of_generation_config(folder: Path) -> set[int]:
    path = folder / _GENERATION_CONFIG
    if not path.is_file():
        return set()
    try:
        return _ids(json.loads(path.read_text()).get("eos_token_id"))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({error}): save the model again") from error


def end_tokens(*configs: Any) -> list[int]:
    """Return the ids that end a text, by any of a model's configs or its tokenizer."""
    found = [getattr(config, "eos_token_id", None) for config in configs]
    listed = [ids if isinstance(ids, list) else [ids] for ids in found if ids is not None]
    return sorted({int(token) for ids in listed for token in ids})


def load_tokenizer(folder: Path) -> Any:
    """Load a model folder's tokenizer; raises ConfigError if it cannot be."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"cannot load the tokenizer of {folder}: {first_line}") from error
