"""Which models are encoder-decoders, by their identity or configuration; no torch."""

from collections.abc import Mapping
from typing import Any

KNOWN_TYPES = ("t5", "mt5")


def is_encoder_decoder(identity: Mapping[str, Any]) -> bool:
    """Return whether an identity is of an encoder-decoder; no step makes one."""
    return bool(identity.get("config", {}).get("is_encoder_decoder"))


def encoder_decoder_problem(identity: Mapping[str, Any], *, is_asked: bool, is_run: bool) -> str:
    """Return why a step cannot use an encoder-decoder, ``""`` where it can or where it is none.

    ``is_asked`` says that the step's setting may name one, ``is_run`` that an engine would run it.
    """
    if not is_encoder_decoder(identity):
        return ""
    found = identity["config"].get("model_type")
    if not is_asked:
        return (
            "is an encoder-decoder, expected a causal language model: an encoder-decoder can be "
            "the teacher of demonstrations, and what a distiller is made of or read by"
        )
    if found not in KNOWN_TYPES:
        return (
            f"is an encoder-decoder of type {found}, known are {' and '.join(KNOWN_TYPES)}: name "
            f"one of those, or a causal language model"
        )
    if "adapter" in identity:
        return "is an encoder-decoder with an adapter, which is not supported: merge the two first"
    if is_run and identity["engine"] == "vllm":
        return "is an encoder-decoder, which vLLM does not serve: set its engine to transformers"
    return ""


def kinds_problem(
    reader: Mapping[str, Any], made_by: Mapping[str, Mapping[str, Any] | None]
) -> str:
    """Return why a reader cannot learn from the tables of some steps, ``""`` if it can.

    A causal model scores the query too, so it and an encoder-decoder score other tokens of a row.
    """
    is_one = is_encoder_decoder(reader)
    for step, model in made_by.items():
        if model is not None and is_encoder_decoder(model) != is_one:
            this, other = ("an", "by a causal model") if is_one else ("no", "by one")
            return (
                f"is {this} encoder-decoder, and '{step}' was made {other}, of other tokens of "
                f"each row: name a reader of the teacher's kind"
            )
    return ""
