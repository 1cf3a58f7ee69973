"""Accept or reject one text, and name it by its content.

The content key is the 128-bit blake2b of the *normalised* text: Unicode NFC, every run of
whitespace one space, none at the ends. Case and punctuation count. Texts with one key are
duplicates. What is tokenised is the text as it was read: normalisation only decides equality.
"""

import hashlib
import json
import unicodedata
from dataclasses import dataclass

KEY_BYTES = 16


@dataclass(frozen=True, slots=True)
class CleanText:
    """A text worth keeping and the key of its content."""

    text: str
    key: bytes


def normalise(text: str) -> str:
    """Return the form in which two texts are compared."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


def clean(value: object, *, min_chars: int, max_chars: int) -> CleanText | str:
    """Return the text with its key, or the reason it is rejected.

    Reasons: missing_text, not_a_string, invalid_unicode, empty_text, too_short, too_long.
    Lengths are in characters of the normalised text.
    """
    text = _decoded(value)
    if text is None:
        return _unusable(value)
    normalised = normalise(text)
    try:
        encoded = normalised.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and UTF-8 cannot
        return "invalid_unicode"
    if not normalised:
        return "empty_text"
    if len(normalised) < min_chars:
        return "too_short"
    if len(normalised) > max_chars:
        return "too_long"
    return CleanText(text, hashlib.blake2b(encoded, digest_size=KEY_BYTES).digest())


def _decoded(value: object) -> str | None:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    return value if isinstance(value, str) else None


def _unusable(value: object) -> str:
    if value is None:
        return "missing_text"
    return "invalid_unicode" if isinstance(value, bytes) else "not_a_string"


def digest_of(*parts: object) -> str:
    """Return 32 hex digits of the 128-bit blake2b of some values, spelled as JSON."""
    text = json.dumps(parts, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
