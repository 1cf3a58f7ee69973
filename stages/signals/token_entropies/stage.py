"""Stage ``token_entropies``: token sequences -> the entropy of a model at every scored position.

Of documents and episodes every position is scored, of conversations those of their spans. Objective
``kd`` selects positions by it where the model is the student that it begins with.
"""

import math
from typing import Any, ClassVar, Literal

from schemas.storage.manifest import Manifest
from schemas.table import BoundTable, Table
from schemas.tables.conversations import CONVERSATIONS
from schemas.tables.documents import DOCUMENTS
from schemas.tables.episodes import EPISODES
from schemas.tables.token_entropies import TOKEN_ENTROPIES
from stages.stage import Estimate, SignalStage, StageContext


class TokenEntropiesStage(SignalStage):
    """Measure how unsure ``model`` is of the rows of step ``input``."""

    VERSION: ClassVar[int] = 1
    CONSUMES: ClassVar[tuple[Table[Any], ...]] = (DOCUMENTS, EPISODES, CONVERSATIONS)

    stage: Literal["token_entropies"]

    @property
    def table(self) -> Table[Any]:
        """``token_entropies``."""
        return TOKEN_ENTROPIES

    def bind(self, context: StageContext) -> BoundTable[Any]:
        """No column depends on the model."""
        return TOKEN_ENTROPIES.bind(vocab_size=context.vocab_size)

    def estimate(self, source: Manifest, *, hidden_size: int) -> Estimate:
        """Two bytes a position, which hardly compress."""
        positions = source.num_tokens - source.num_rows
        if source.table == CONVERSATIONS.name:
            positions = source.num_positions
        return Estimate(positions, math.ceil(1.9 * positions))
