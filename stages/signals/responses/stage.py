"""Stage ``responses``: preference pairs or conversations -> what a model answers to their prompts.

ADPA (arXiv 2502.17927) trains on the student's own responses: the SFT student's, and for ADPA+ the
one's that DCKD made. Its authors decode greedily, keep the text and tokenise it again; here the
ids that were generated are kept. Of a conversation the prompt is all that stands before its last
answer, so a teacher's responses can take the answers' place (stage ``answers``).
"""

import math
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from schemas.errors import ConfigError
from schemas.storage.manifest import Manifest
from schemas.table import BoundTable, Table
from schemas.tables.conversations import CONVERSATIONS
from schemas.tables.preference_pairs import PREFERENCE_PAIRS
from schemas.tables.prompted.responses import RESPONSES
from stages.stage import Estimate, SignalStage, StageContext

LOWEST_TEMPERATURE = 0.01  # vLLM raises a lower one to this, and takes next to 0 for greedy


class ResponsesStage(SignalStage):
    """Let ``model`` answer each prompt of step ``input`` ``n`` times.

    ``temperature`` 0 is greedy decoding. ``stop_token_ids`` unset are the ids that end a text or a
    turn by the model's folder (``stages.models.causal_lm.end_tokens``). ``top_k`` of the model's
    likeliest tokens are kept at each position, whatever is sampled.
    """

    VERSION: ClassVar[int] = 2
    CONSUMES: ClassVar[tuple[Table[Any], ...]] = (PREFERENCE_PAIRS, CONVERSATIONS)

    stage: Literal["responses"]
    max_tokens: int = Field(ge=1)
    temperature: float = Field(default=0.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    n: int = Field(default=1, ge=1)
    stop_token_ids: tuple[int, ...] | None = Field(default=None, min_length=1)
    top_k: int = Field(default=16, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _sampling_makes_sense(self) -> "ResponsesStage":
        if 0 < self.temperature < LOWEST_TEMPERATURE:
            raise ValueError(
                f"temperature is {self.temperature}, expected 0 (greedy) or at least "
                f"{LOWEST_TEMPERATURE}"
            )
        if self.n > 1 and not self.temperature:
            raise ValueError(
                f"n is {self.n} at temperature 0, so all {self.n} responses would be the same: "
                f"raise the temperature or leave n at 1"
            )
        return self

    def hashed(self) -> dict[str, Any]:
        """Return what names the step by content, under the name that the stage had first."""
        return super().hashed() | {"stage": "student_responses"}

    @property
    def table(self) -> Table[Any]:
        """``responses``."""
        return RESPONSES

    def bind(self, context: StageContext) -> BoundTable[Any]:
        """Token id width from the vocabulary, K is ``top_k``."""
        if self.top_k > context.vocab_size:
            raise ConfigError(
                f"top_k is {self.top_k}, the vocabulary has {context.vocab_size} tokens: lower it"
            )
        return RESPONSES.bind(vocab_size=context.vocab_size, sizes={"K": self.top_k})

    def estimate(self, source: Manifest, *, hidden_size: int) -> Estimate:
        """Guess: responses end half way to ``max_tokens``, a prompt is a third of its row."""
        id_bytes = 0.9 * math.log2(source.vocab_size) / 8
        positions = math.ceil(source.num_rows * self.n * self.max_tokens / 2)
        per_position = id_bytes + 4.0 + self.top_k * (id_bytes + 1.8)
        prompts = source.num_tokens / 3 * id_bytes
        return Estimate(positions, math.ceil(positions * per_position + prompts))
