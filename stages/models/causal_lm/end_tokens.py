"""Which tokens end a text and which a response, by a model's folder.

An end of text by ``config.json`` or the tokenizer, and the token that closes the assistant's turn
in the chat template: a base model's tokenizer often ends texts with another one, and a student
trained on turns would then talk on past the end of its own.

All three are part of a model's identity. ``generation_config.json`` is not, so what it alone names
is not used: a folder that names more there is refused, and the recipe has to say which it means.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError
from stages.models.causal_lm.language_head import read_config
from stages.models.checkpoints.chat_template import ChatTemplate, TemplateRefusal
from stages.models.checkpoints.tokenizer import open_tokenizer

_GENERATION_CONFIG = "generation_config.json"


def stop_tokens_of(folder: Path) -> tuple[int, ...]:
    """Return the ids that end a response, lowest first.

    Raises ConfigError where the folder names none, or more in ``generation_config.json``.
    """
    tokenizer = open_tokenizer(folder)
    config = read_config(folder).get_text_config()
    try:
        found = {*end_tokens(config, tokenizer), *end_of_turn(tokenizer)}
    except TemplateRefusal as error:
        raise ConfigError(
            f"the chat template of {folder} fails on a question and an answer ({error}): correct "
            f"it, or give stop_token_ids in the recipe"
        ) from error
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


def answer_ends(tokenizer: Any, *configs: Any) -> list[int]:
    """Return the ids that end an answer: an end of text, or of the assistant's turn.

    A chat template that cannot write an answer ends none.
    """
    ends = set(end_tokens(*configs, tokenizer))
    with suppress(TemplateRefusal):
        ends |= end_of_turn(tokenizer)
    return sorted(ends)


def end_of_turn(tokenizer: Any) -> set[int]:
    """Return the token that ends the assistant's turn in the chat template, if there is one.

    Raises TemplateRefusal for a template that cannot write a question and its answer.
    """
    template = ChatTemplate(tokenizer)
    closing = template.closing_text if template.is_there else None
    return set() if closing is None else {int(tokenizer.convert_tokens_to_ids(closing))}


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
