"""Stage ``conversations``: chats -> the ``conversations`` table, whose rows say what is scored.

A row is the text of the tokenizer's own chat template, and spans of it: what an assistant said, up
to the token that closes the turn. Where the template marks answers itself (``{% generation %}``)
its marks are taken, else an answer is what the template adds to the text up to its header.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, JsonValue, model_validator

from schemas.table import Table
from schemas.tables.conversations import CONVERSATIONS
from stages.sources.dialogues.template_settings import check_settings
from stages.sources.reading.source import HubData, RowFiles
from stages.stage import SourceStage, StageConfig


class ChatColumns(StageConfig):
    """How a row holds a conversation.

    ``messages``: a list of ``{role, content}``, in column ``column`` (``messages`` by default).
    ``sharegpt``: a list of ``{from, value}``, in ``column`` (``conversations`` by default), after
    the text ``system`` if there is one. ``alpaca``: the texts ``instruction``, ``input`` (behind a
    line break where it is not empty) and ``output``, after ``system`` if there is one.
    ``prompt_completion``: ``prompt`` and ``completion``, each a text or a list of messages. In all,
    ``tools`` is the column of what a row offers to be called, and what a message holds beside its
    text goes to the chat template.
    """

    format: Literal["messages", "sharegpt", "alpaca", "prompt_completion"] = "messages"
    column: str | None = None

    @model_validator(mode="after")
    def _column_where_used(self) -> "ChatColumns":
        if self.column is not None and self.format not in ("messages", "sharegpt"):
            raise ValueError(
                f"column: format {self.format} has columns of its own names; leave it out"
            )
        return self


class ChatFiles(RowFiles, ChatColumns):
    """Files of conversations, one a row."""


class HubChats(HubData, ChatColumns):
    """A data set of the hub, one conversation a row."""


ChatSource = Annotated[ChatFiles | HubChats, Field(discriminator="kind")]


class ConversationsStage(SourceStage):
    """Read conversations, apply the chat template, tokenise, split by content of the opening.

    ``turns`` says which tokens are scored: all answers of the assistant, the ``last`` one alone,
    ``all`` tokens but the first, or ``none``: then a row is a prompt, up to the header of the
    answer that is to come. Other rows end with the last answer. Where a template writes an earlier
    answer otherwise than it was given (Qwen3 drops its thoughts), that answer is scored in a row of
    its own, which ends with it.

    ``chat_template_kwargs`` are given to the template for every row. A row of more than
    ``max_length`` tokens is rejected, or cut (a prompt never). ``max_rows`` keeps a sample of at
    most so many rows, train and held-out in proportion, each rounded down.
    """

    VERSION: ClassVar[int] = 1

    stage: Literal["conversations"]
    source: ChatSource
    chat_template_kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    turns: Literal["assistant", "last", "all", "none"] = "assistant"
    max_length: int = Field(ge=2)
    long_conversations: Literal["reject", "truncate"] = "reject"
    heldout_fraction: float = Field(ge=0.0, lt=1.0)
    rows_per_shard: int = Field(default=256, ge=1)
    max_rows: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _settings_of_a_template(self) -> "ConversationsStage":
        check_settings(self.chat_template_kwargs)
        return self

    @property
    def table(self) -> Table[Any]:
        """The table this stage writes."""
        return CONVERSATIONS

    def source_identity(self) -> dict[str, Any]:
        """Return what is read of the source, and name, size and sha256 of each file, in order."""
        settings = self.source.model_dump(mode="json", exclude={"paths"})
        return {"source": settings | {"files": self.source.identity()}}
