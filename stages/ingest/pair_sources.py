"""Where preference pairs come from: any table that ``datasets`` reads, in one of three formats."""

from typing import Annotated, Any, Literal

from pydantic import Field

from stages.ingest.source import HubData, RowFiles
from stages.stage import StageConfig


class PairColumns(StageConfig):
    """How a row holds its prompt and its two responses.

    ``standard``: ``prompt``, ``chosen`` and ``rejected`` name columns of texts or of chat messages
    ``{role, content}``; where the responses are whole dialogues (UltraFeedback binarised), the
    prompt is all of them but the last message, and a column of prompts is not read. ``hh_rlhf``:
    ``chosen`` and ``rejected`` are transcripts of ``Human:`` and ``Assistant:``. ``sharegpt``:
    ``conversations`` of ``{from, value}`` is the prompt, with ``system`` before it if there is one;
    ``chosen`` and ``rejected`` are such messages.
    """

    format: Literal["standard", "hh_rlhf", "sharegpt"] = "standard"
    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"


class PairFiles(RowFiles, PairColumns):
    """Files of pairs, one a row."""


class HubPairs(HubData, PairColumns):
    """A data set of the hub, one pair a row."""


PairSource = Annotated[PairFiles | HubPairs, Field(discriminator="kind")]


def settings_of(source: PairFiles | HubPairs) -> dict[str, Any]:
    """Return what decides which pairs are read: settings, and name, size, sha256 of each file."""
    return source.model_dump(mode="json", exclude={"paths"}) | {"files": source.identity()}
