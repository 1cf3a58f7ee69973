"""Stage ``aligned_spans``: signals -> a teacher's log-probs of spans of text in other tokens."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from schemas.errors import ConfigError
from schemas.storage.files import Folder
from schemas.storage.manifest import Manifest
from schemas.storage.records import ShardRecord
from schemas.table import BoundTable, Table
from schemas.tables.aligned_spans import ALIGNED_ENTRIES, ALIGNED_SPANS
from schemas.tables.documents import DOCUMENTS
from schemas.tables.teacher_logits import ENCODINGS, EXACT
from stages.stage import Estimate, StageContext, TableRef, TableStage


class AlignedSpansStage(TableStage):
    """Lay ``documents`` in the tokens of ``tokenizer`` over the signals of step ``input``.

    ``teacher`` names the model whose ids documents and signals hold, ``tokenizer`` the student's: a
    model of the recipe or a folder. Neither's weights are loaded. A row whose bytes are not known
    exactly is a reject with its reason. With ``entries`` the teacher's likeliest tokens where a
    span begins are kept, each under the student's token that its bytes begin with; of ``threshold``
    signals they are the head, of ``top_k`` all.
    """

    VERSION: ClassVar[int] = 2
    CONSUMES: ClassVar[tuple[Table[Any], ...]] = tuple(ENCODINGS.values())
    READS: ClassVar[tuple[str, ...]] = ("input", "documents")
    RUNS: ClassVar[tuple[str, ...]] = ("teacher",)
    TOKENIZER: ClassVar[str] = "tokenizer"
    NOT_HASHED: ClassVar[tuple[str, ...]] = (*TableStage.NOT_HASHED, "documents", "teacher")

    stage: Literal["aligned_spans"]
    documents: str
    teacher: str
    tokenizer: str
    entries: bool = False

    @property
    def table(self) -> Table[Any]:
        """``aligned_spans``, in the variant that ``entries`` says."""
        return ALIGNED_ENTRIES if self.entries else ALIGNED_SPANS

    def check(self, tables: Sequence[TableRef], models: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse tables that the stage does not read."""
        super().check(tables[:1], models)
        if self.entries and tables[0].table.variant == EXACT.variant:
            raise ConfigError(
                f"entries: step '{tables[0].step}' keeps hidden states (exact), and no entries: "
                f"leave it out, or give that step encoding threshold or top_k"
            )
        if tables[1].table.name != DOCUMENTS.name:
            raise ConfigError(
                f"documents: step '{tables[1].step}' writes {tables[1].table.name}, expected the "
                f"{DOCUMENTS.name} that the signals are of"
            )

    def bind(self, context: StageContext) -> BoundTable[Any]:
        """Token id width from the student's vocabulary."""
        return self.table.bind(vocab_size=context.vocab_size)

    def estimate(self, source: Manifest, *, hidden_size: int) -> Estimate:
        """As many tokens as the teacher's, each a span of five bytes beside its id.

        Web pages had four entries a span (tau 0.04).
        """
        id_bytes = 0.9 * math.log2(source.vocab_size) / 8
        span_bytes = 5.0 + (4 * (id_bytes + 1.8) if self.entries else 0.0)
        positions = source.num_positions
        return Estimate(positions, math.ceil(positions * (id_bytes + span_bytes)))

    def measures(self, folder: Folder, shards: Sequence[ShardRecord]) -> Mapping[str, float]:
        """Return how much of the text lies in spans, and how long they are."""
        measures: Mapping[str, float] = self.work.measures(self.table, folder, shards)
        return measures
