"""Text that spells a control token (``<|im_end|>``): kept as that, split or rejected, and counted.

A tokenizer makes the token of its spelling, wherever it stands, so a page about chat templates ends
a turn in the middle of itself. Preference pairs reject such text always: there it would part turns.
"""

import re
from collections.abc import Iterable
from typing import Literal

from stages.sources.reading.tokens import TextTokenizer

KEPT, SPLIT, REJECTED = "control_tokens_kept", "control_tokens_split", "special_token_in_text"


class ControlTokenRule:
    """What a source does with such text; ``split`` makes the tokenizer split it from now on."""

    def __init__(self, tokenizer: TextTokenizer, rule: Literal["keep", "split", "reject"]) -> None:
        """Find out how the tokenizer's special tokens are spelled, and which it can split."""
        spelled = "|".join(map(re.escape, tokenizer.special_texts))
        self._special = re.compile(spelled or "(?!)")
        self._rule = rule
        self._whole = tokenizer.split_special_tokens() if rule == "split" else frozenset()

    def outcome(self, texts: Iterable[str]) -> str | None:
        """Return what these texts together are counted as, None where they spell no such token.

        ``REJECTED`` has no row, also where a token is to be split and the tokenizer cannot.
        """
        found = {token for text in texts for token in self._special.findall(text)}
        if not found:
            return None
        if self._rule == "reject" or found & self._whole:
            return REJECTED
        return SPLIT if self._rule == "split" else KEPT
