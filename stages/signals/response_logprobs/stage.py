"""Stage ``response_logprobs``: pairs or responses -> a model's log-prob of each response.

Of preference pairs both responses are scored, chosen first; of ``responses`` all of a row. With
``per_token`` the log-prob of each token is kept, not their sum: what ``opd`` reads of a teacher.
"""

import math
from typing import Any, ClassVar, Literal

from schemas.storage.manifest import Manifest
from schemas.table import BoundTable, Table
from schemas.tables.preference_pairs import PREFERENCE_PAIRS
from schemas.tables.response_logprobs import RESPONSE_LOGPROBS
from schemas.tables.response_token_logprobs import RESPONSE_TOKEN_LOGPROBS
from schemas.tables.responses import RESPONSES
from stages.stage import Estimate, SignalStage, StageContext


class ResponseLogprobsStage(SignalStage):
    """Score every response of the rows of step ``input`` with ``model``."""

    VERSION: ClassVar[int] = 2
    CONSUMES: ClassVar[tuple[Table[Any], ...]] = (PREFERENCE_PAIRS, RESPONSES)

    stage: Literal["response_logprobs"]
    per_token: bool = False

    def hashed(self) -> dict[str, Any]:
        """Return what names the step by content; sums keep the name that they had first."""
        hashed = super().hashed()
        if not self.per_token:
            del hashed["config"]["per_token"]
        return hashed

    @property
    def table(self) -> Table[Any]:
        """``response_logprobs``, or ``response_token_logprobs`` with ``per_token``."""
        return RESPONSE_TOKEN_LOGPROBS if self.per_token else RESPONSE_LOGPROBS

    def bind(self, context: StageContext) -> BoundTable[Any]:
        """No column depends on the model."""
        return self.table.bind(vocab_size=context.vocab_size)

    def estimate(self, source: Manifest, *, hidden_size: int) -> Estimate:
        """Guess: two responses a row, each a float32 and a small number.

        With ``per_token`` a float32 a token of a response: of pairs two thirds of all tokens, of
        ``responses`` every position.
        """
        if self.per_token:
            generated = source.num_positions or math.ceil(source.num_tokens * 2 / 3)
            return Estimate(generated, math.ceil(generated * 3.7 + source.num_rows * 26))
        positions = source.num_rows * 2
        return Estimate(positions, positions * 6 + source.num_rows * 26)
