"""Stage ``answers``: a model's responses -> conversations that end with one of them each.

Sequence-level distillation (arXiv 1606.07947): a student learns what the teacher itself said, and
with ``teacher_logits`` of these conversations the distributions it said it with. Ids are the
generated ones; no text is tokenised again.
"""

import math
import re
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from schemas.storage.manifest import Manifest
from schemas.table import BoundTable, Table
from schemas.tables.conversations import CONVERSATIONS
from schemas.tables.prompted.responses import RESPONSES
from stages.sources.reading.source import RowFiles
from stages.stage import Estimate, StageContext, TableStage


class ScoreFiles(RowFiles):
    """Files of scores, the higher the better: a row a response.

    ``sample_id`` is that of the row of ``responses``, ``response`` its number there, from 0, and
    ``column`` names the score.
    """

    column: str = "score"


class AnswersStage(TableStage):
    """Keep the responses of step ``input`` that pass, each as a row after its prompt.

    ``finish_reasons``: ``stop`` ended by itself, ``length`` ran out of tokens. ``min_tokens`` and
    ``max_tokens`` count a response's own, the closing one too. ``min_mean_logprob`` is of its
    tokens by the model that wrote it, in nats. ``matching`` and ``not_matching`` are regular
    expressions that are searched in its text without special tokens; they need ``tokenizer``, a
    model of the recipe. ``min_score`` is of the user's ``scores``; a response without one does not
    pass. Of equal responses to a prompt one is kept; ``keep: best`` keeps the one of the best
    score alone, without ``scores`` of the best mean log-prob. What does not pass is a reject with
    its reason, of any number.
    """

    VERSION: ClassVar[int] = 1
    CONSUMES: ClassVar[tuple[Table[Any], ...]] = (RESPONSES,)
    RUNS: ClassVar[tuple[str, ...]] = ("tokenizer",)
    NOT_HASHED: ClassVar[tuple[str, ...]] = (*TableStage.NOT_HASHED, "tokenizer")

    stage: Literal["answers"]
    tokenizer: str | None = None
    finish_reasons: tuple[Literal["stop", "length"], ...] = Field(default=("stop",), min_length=1)
    min_tokens: int = Field(default=1, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    min_mean_logprob: float | None = Field(default=None, le=0.0)
    matching: str | None = None
    not_matching: str | None = None
    scores: ScoreFiles | None = None
    min_score: float | None = Field(default=None, allow_inf_nan=False)
    keep: Literal["all", "best"] = "all"
    max_rejected_fraction: float = Field(default=1.0, ge=0.0, le=1.0)

    @field_validator("matching", "not_matching")
    @classmethod
    def _is_an_expression(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"{value!r} is no regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _lengths_that_something_has(self) -> "AnswersStage":
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(
                f"max_tokens is {self.max_tokens}, less than min_tokens ({self.min_tokens}): "
                f"nothing would be left"
            )
        return self

    @model_validator(mode="after")
    def _tokenizer_where_used(self) -> "AnswersStage":
        of_text = self.matching is not None or self.not_matching is not None
        if of_text and self.tokenizer is None:
            raise ValueError(
                "matching and not_matching are about text: name a model in 'tokenizer' that the "
                "responses are read with"
            )
        if self.tokenizer is not None and not of_text:
            raise ValueError("tokenizer: only matching and not_matching read text; leave it out")
        return self

    @model_validator(mode="after")
    def _scores_where_used(self) -> "AnswersStage":
        if self.scores is None and self.min_score is not None:
            raise ValueError("min_score is about scores: name their files in 'scores'")
        if self.scores is not None and self.min_score is None and self.keep != "best":
            raise ValueError("scores: only min_score and keep: best read them; give one of the two")
        return self

    def hashed(self) -> dict[str, Any]:
        """Return what names the step by content: scores, where there are some, by their files."""
        body = super().hashed()
        config = body["config"]
        if self.scores is None:
            del config["scores"], config["min_score"]
        else:
            settings = self.scores.model_dump(mode="json", exclude={"paths"})
            config["scores"] = settings | {"files": self.scores.identity()}
        return body

    @property
    def table(self) -> Table[Any]:
        """``conversations``."""
        return CONVERSATIONS

    def bind(self, context: StageContext) -> BoundTable[Any]:
        """Token id width from the input's vocabulary."""
        return self.table.bind(vocab_size=context.vocab_size)

    def estimate(self, source: Manifest, *, hidden_size: int) -> Estimate:
        """All responses, as if none were left out."""
        id_bytes = 0.9 * math.log2(source.vocab_size) / 8
        return Estimate(source.num_positions, math.ceil(source.num_tokens * id_bytes))
