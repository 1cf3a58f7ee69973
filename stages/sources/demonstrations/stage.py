"""Stage ``demonstrations``: documents or episodes -> a query after what teacher and distiller read.

MEND (arXiv 2403.06914). Stage 1 cuts documents: the first ``demonstration_fraction`` of the tokens,
rounded down, is the demonstration and the rest the query. Stage 2 takes episodes: the draws of
demonstrations for each query are those of the ``episodes`` step (its ``draws``), where the
published code draws anew at each access. No model is run.
"""

import math
from typing import Any, ClassVar, Literal

from pydantic import Field

from schemas.storage.manifest import Manifest
from schemas.table import BoundTable, Table
from schemas.tables.demonstrations import DEMONSTRATIONS
from schemas.tables.documents import DOCUMENTS
from schemas.tables.episodes import EPISODES
from stages.stage import Estimate, StageContext, TableStage


class DemonstrationsStage(TableStage):
    """Cut the rows of step ``input`` into demonstrations and query.

    ``teacher_tokens`` and ``distiller_tokens`` are how many tokens of demonstrations each may read,
    the beginning of a text (BOS) included; without one it reads all. The first demonstrations that
    fit are kept, each whole; a row of which one of the two could read none is rejected.
    ``demonstration_fraction`` is that of documents; episodes have their own spans.
    """

    VERSION: ClassVar[int] = 2
    CONSUMES: ClassVar[tuple[Table[Any], ...]] = (DOCUMENTS, EPISODES)

    stage: Literal["demonstrations"]
    demonstration_fraction: float = Field(default=0.8, gt=0.0, lt=1.0)
    teacher_tokens: int | None = Field(default=None, ge=1)
    distiller_tokens: int | None = Field(default=None, ge=1)

    @property
    def table(self) -> Table[Any]:
        """The table this stage writes."""
        return DEMONSTRATIONS

    def bind(self, context: StageContext) -> BoundTable[Any]:
        """Token id width from the input's vocabulary."""
        return self.table.bind(vocab_size=context.vocab_size)

    def estimate(self, source: Manifest, *, hidden_size: int) -> Estimate:
        """Documents' queries by their share, and episodes' as if they were documents'."""
        queries = math.ceil(source.num_tokens * (1.0 - self.demonstration_fraction))
        id_bytes = 0.9 * math.log2(source.vocab_size) / 8
        positions = max(queries - source.num_rows, 0)
        return Estimate(positions, math.ceil(2 * source.num_tokens * id_bytes))
