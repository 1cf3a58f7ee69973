"""Up to how many tokens a model's rotary frequencies do not depend on the length of a row.

Two kinds of scaling make them depend on it, and the libraries disagree on whose length: that of
the longest row of a batch (transformers), or of the window that an engine was started with (vLLM).
LongRoPE (Phi-3 and later) has short factors for rows of up to ``original_max_position_embeddings``
tokens and long ones beyond; ``dynamic`` scaling leaves frequencies alone up to
``max_position_embeddings`` tokens. Within that window all agree, so it is the model's window here.

A LongRoPE model whose short and long factors are equal has one set for all lengths.
"""

from collections.abc import Iterator, Mapping
from typing import Any

ONE_SET = (
    "beyond that its rotary factors depend on a row's length: for longer rows take a model that "
    "has one set (of LongRoPE, a copy with short_factor set to its long_factor in config.json)"
)
_ORIGINAL = "original_max_position_embeddings"
_BY_LENGTH = (("short_factor", "long_factor"), ("short_mscale", "long_mscale"))


def fixed_window(config: Mapping[str, Any]) -> int | None:
    """Return those tokens by a model's config, or None where no length moves the frequencies."""
    text = config.get("text_config") or config
    found = []
    for scaling in _scalings(text):
        if any(scaling.get(short) != scaling.get(long) for short, long in _BY_LENGTH):
            found.append(scaling.get(_ORIGINAL) or text.get(_ORIGINAL))
        elif _kind(scaling) == "dynamic":
            found.append(text.get("max_position_embeddings"))
    return min((int(limit) for limit in found if limit), default=None)


def is_longrope(config: Mapping[str, Any]) -> bool:
    """Whether a model has LongRoPE's factors, equal or not."""
    text = config.get("text_config") or config
    return any("long_factor" in scaling for scaling in _scalings(text))


def _scalings(text: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a model's scaling, or one for each type of layer, under its new or its old name."""
    scaling = text.get("rope_parameters") or text.get("rope_scaling") or {}
    by_layer = [value for value in scaling.values() if isinstance(value, dict)]
    yield from by_layer or [scaling]


def _kind(scaling: Mapping[str, Any]) -> Any:
    return scaling.get("rope_type", scaling.get("type"))
