"""Stage ``response_logprobs``: pairs or responses -> a model's log-prob of each response.

Of preference pairs both responses are scored, chosen first; of ``responses`` all of a row.
"""

from typing import Any, ClassVar, Literal

from schemas.storage.manifest import Manifest
from schemas.table import BoundTable, Table
from schemas.tables.preference_pairs import PREFERENCE_PAIRS
from schemas.tables.response_logprobs import RESPONSE_LOGPROBS
from schemas.tables.responses import RESPONSES
from stages.stage import Estimate, SignalStage, StageContext


class ResponseLogprobsStage(SignalStage):
    """Score every response of the rows of step ``input`` with ``model``."""

    VERSION: ClassVar[int] = 2
    CONSUMES: ClassVar[tuple[Table[Any], ...]] = (PREFERENCE_PAIRS, RESPONSES)

    stage: Literal["response_logprobs"]

    @property
    def table(self) -> Table[Any]:
        """``response_logprobs``."""
        return RESPONSE_LOGPROBS

    def bind(self, context: StageContext) -> BoundTable[Any]:
        """No column depends on the model."""
        return RESPONSE_LOGPROBS.bind(vocab_size=context.vocab_size)

    def estimate(self, source: Manifest, *, hidden_size: int) -> Estimate:
        """Guess: two responses a row, each a float32 and a small number."""
        positions = source.num_rows * 2
        return Estimate(positions, positions * 6 + source.num_rows * 26)
