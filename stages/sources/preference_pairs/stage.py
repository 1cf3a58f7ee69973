"""Stage ``preference_pairs``: prompts with two responses each -> the ``preference_pairs`` table.

Data as DPO, DCKD and ADPA (arXiv 2502.17927, section 4.1) take it: the prompt is all turns but the
last, the response the last one. Where we differ from the published code: the chat template is
applied once, to text, and ids are kept, so no model sees a second BOS; the token that ends the
assistant's turn is part of a finished response; a response cut to length is marked as such.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, JsonValue, model_validator

from schemas.table import Table
from schemas.tables.preference_pairs import PREFERENCE_PAIRS
from stages.sources.dialogues.template_settings import check_settings
from stages.sources.reading.source import HubData, RowFiles
from stages.stage import SourceStage, StageConfig


class PairColumns(StageConfig):
    """How a row holds its prompt and its two responses.

    ``standard``: ``prompt``, ``chosen`` and ``rejected`` name columns of texts or of chat messages
    ``{role, content}``; where the responses are whole dialogues (UltraFeedback binarised), the
    prompt is all of them but the last message, and a column of prompts is not read. ``hh_rlhf``:
    ``chosen`` and ``rejected`` are transcripts of ``Human:`` and ``Assistant:``. ``sharegpt``:
    ``conversations`` of ``{from, value}`` is the prompt, with ``system`` before it if there is one;
    ``chosen`` and ``rejected`` are such messages. In all, ``tools`` is the column of what a row
    offers to be called, and what a message holds beside its text goes to the chat template.
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


class PreferencePairsStage(SourceStage):
    """Read pairs, check them, apply the chat template, tokenise, split by content of the prompt.

    ``template`` is the tokenizer's own (``chat``), or none at all (``plain``: the prompt's text,
    then the response's, then EOS). ``chat_template_kwargs`` are given to it for every row, such as
    ``enable_thinking: false``. Lengths are in tokens. A prompt that is too long loses its
    earliest turns; ``long_responses`` says whether a response that is too long costs its row or its
    end. ``max_rows`` keeps a sample of at most so many rows, train and held-out in proportion, each
    rounded down.
    """

    VERSION: ClassVar[int] = 2

    stage: Literal["preference_pairs"]
    source: PairSource
    template: Literal["chat", "plain"] = "chat"
    chat_template_kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    max_prompt_length: int = Field(ge=1)
    max_response_length: int = Field(ge=1)
    long_responses: Literal["reject", "truncate"] = "reject"
    heldout_fraction: float = Field(ge=0.0, lt=1.0)
    rows_per_shard: int = Field(default=256, ge=1)
    max_rows: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _settings_of_a_template(self) -> "PreferencePairsStage":
        if self.chat_template_kwargs and self.template == "plain":
            raise ValueError("chat_template_kwargs: template: plain has none; leave them out")
        check_settings(self.chat_template_kwargs)
        return self

    @property
    def table(self) -> Table[Any]:
        """The table this stage writes."""
        return PREFERENCE_PAIRS

    def source_identity(self) -> dict[str, Any]:
        """Return what is read of the source, and name, size and sha256 of each file, in order."""
        return {"source": settings_of(self.source)}
