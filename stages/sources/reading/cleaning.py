"""Accept or reject one text, and name it by its content.

The content key is the 128-bit blake2b of the *normalised* text: Unicode NFC, every run of
whitespace one space, none at the ends. Case and punctuation count. Texts with one key are
duplicates. What is tokenised is the text as it was read: normalisation only decides equality.
"""

import hashlib
import json
import unicodedata
from dataclasses import dataclass

from stages.sources.reading.lines import decoded, shown, valid
from stages.sources.reading.rejects import MalformedRecord, UnusableRecord

KEY_BYTES = 16


@dataclass(frozen=True, slots=True)
class CleanText:
    """A text worth keeping and the key of its content."""

    text: str
    key: bytes


def normalise(text: str) -> str:
    """Return the form in which two texts are compared."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


def clean(value: object, *, min_chars: int, max_chars: int) -> CleanText:
    """Return the text with its key; ``value`` is a text, or the bytes of one.

    Raises MalformedRecord (missing_text, not_a_string, invalid_unicode) and UnusableRecord
    (empty_text, too_short, too_long). Lengths are in characters of the normalised text.
    """
    text = _text(value)
    normalised = normalise(valid(text, "text"))
    if not normalised:
        raise UnusableRecord("empty_text", "the text is empty")
    if len(normalised) < min_chars:
        raise UnusableRecord("too_short", f"{len(normalised)} characters, fewer than min_chars")
    if len(normalised) > max_chars:
        raise UnusableRecord("too_long", f"{len(normalised)} characters, more than max_chars")
    return CleanText(text, hashlib.blake2b(normalised.encode(), digest_size=KEY_BYTES).digest())


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return decoded(value)
    if value is None:
        raise MalformedRecord("missing_text", "the text is null")
    if not isinstance(value, str):
        raise MalformedRecord("not_a_string", f"the text is {shown(value)}")
    return value


def digest_of(*parts: object) -> str:
    """Return 32 hex digits of the 128-bit blake2b of some values, spelled as JSON."""
    text = json.dumps(parts, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
