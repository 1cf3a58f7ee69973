"""What a recipe may give a chat template: settings that the template alone reads."""

import json
from typing import Any

_OF_THE_STAGE = frozenset(  # what a stage gives a chat template itself, or asks of transformers
    (
        *("conversation", "messages", "tools", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "tokenizer_kwargs", "strftime_now"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict"),
        "return_assistant_tokens_mask",
    )
)


def check_settings(settings: dict[str, Any]) -> None:
    """Raise ValueError for ``chat_template_kwargs`` that are none of the template's."""
    if taken := _OF_THE_STAGE.intersection(settings):
        raise ValueError(
            f"chat_template_kwargs: {', '.join(sorted(taken))} is given by the stage itself, "
            f"expected what the template alone reads, such as enable_thinking"
        )
    try:
        json.dumps(settings, allow_nan=False)
    except ValueError:
        raise ValueError("chat_template_kwargs: a number is not finite") from None
