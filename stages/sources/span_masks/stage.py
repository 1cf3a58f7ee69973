"""Stage ``span_masks``: token sequences -> the spans of each that a user marked, by ``sample_id``.

Objective ``kd`` trains at the marked tokens alone (``positions: {by: mask}``): one table of a
teacher's serves any number of masks.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field

from schemas.storage.manifest import Manifest
from schemas.table import BoundTable, Table
from schemas.tables.conversations import CONVERSATIONS
from schemas.tables.documents import DOCUMENTS
from schemas.tables.episodes import EPISODES
from schemas.tables.span_masks import SPAN_MASKS
from stages.sources.reading.source import RowFiles
from stages.stage import Estimate, StageContext, TableStage

_BYTES_A_ROW = 40  # a key, and a few spans


class SpanFiles(RowFiles):
    """Files of spans: a row for each ``sample_id`` of the input.

    ``column`` names a list of pairs, ``[start, end)`` of indices in the row's token ids.
    """

    column: str = "spans"


class SpanMasksStage(TableStage):
    """Keep the spans of ``source`` for each row of step ``input``.

    A row without spans, or with none that holds a scored token, is a reject with its reason, of any
    number: it is not trained on.
    """

    VERSION: ClassVar[int] = 1
    CONSUMES: ClassVar[tuple[Table[Any], ...]] = (DOCUMENTS, EPISODES, CONVERSATIONS)

    stage: Literal["span_masks"]
    source: SpanFiles
    max_rejected_fraction: float = Field(default=1.0, ge=0.0, le=1.0)

    def hashed(self) -> dict[str, Any]:
        """Return what names the step by content: the spans by their files."""
        body = super().hashed()
        settings = self.source.model_dump(mode="json", exclude={"paths"})
        body["config"]["source"] = settings | {"files": self.source.identity()}
        return body

    @property
    def table(self) -> Table[Any]:
        """``span_masks``."""
        return SPAN_MASKS

    def bind(self, context: StageContext) -> BoundTable[Any]:
        """No column depends on a model."""
        return SPAN_MASKS.bind(vocab_size=context.vocab_size)

    def estimate(self, source: Manifest, *, hidden_size: int) -> Estimate:
        """A key and a few spans a row; how many tokens they have is not known."""
        return Estimate(0, source.num_rows * _BYTES_A_ROW)
