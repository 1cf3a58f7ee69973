"""Stage ``ingest``: text from files or the hub -> the ``documents`` table of token ids.

``pack`` joins documents, each followed by the end-of-sequence token, and cuts the stream into rows
of exactly ``length`` tokens; the last piece of each split, shorter than that, is dropped and
counted as ``packing_remainder``. ``truncate`` makes one row of each document's first ``length``
tokens. Every row begins with what the tokenizer itself puts before a text (a BOS, or nothing):
a teacher that was trained with a BOS is far off without one. It counts in ``length``.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from schemas.table import Table
from schemas.tables.documents import DOCUMENTS
from stages.models.checkpoints.tokenizer_identity import first_tokens
from stages.sources.reading.source import Source
from stages.stage import SourceStage


class IngestStage(SourceStage):
    """Read ``source``, clean, de-duplicate, split by content hash, tokenise, pack or truncate.

    ``tokenizer`` is a model folder. ``min_chars`` and ``max_chars`` bound a document's normalised
    text; ``max_chars`` also bounds memory, as a document is tokenised whole. ``bos`` says what rows
    begin with: what the ``tokenizer`` itself puts first, ``always`` its BOS token, or ``never``
    either. ``control_tokens`` is about text that spells a special token: ``keep`` it as that token,
    ``split`` it into ordinary ones, or ``reject`` the document. ``max_rows`` keeps a sample of at
    most so many rows, train and held-out in proportion, each rounded down.
    """

    VERSION: ClassVar[int] = 1

    stage: Literal["ingest"]
    source: Source
    length: int = Field(ge=2)
    mode: Literal["pack", "truncate"]
    bos: Literal["tokenizer", "always", "never"] = "tokenizer"
    heldout_fraction: float = Field(ge=0.0, lt=1.0)
    control_tokens: Literal["keep", "split", "reject"] = "keep"
    min_chars: int = Field(default=1, ge=1)
    max_chars: int = Field(default=10_000_000, ge=1)
    rows_per_shard: int = Field(default=1024, ge=1)
    max_rows: int | None = Field(default=None, ge=2)

    @property
    def table(self) -> Table[Any]:
        """The table this stage writes."""
        return DOCUMENTS

    def hashed(self) -> dict[str, Any]:
        """Return what names the step by content: ``bos`` and ``control_tokens`` where they tell."""
        body = super().hashed()
        if self.control_tokens == "keep":
            del body["config"]["control_tokens"]
        folder = Path(self.tokenizer).expanduser()
        if self.bos == "never" or (self.bos == "tokenizer" and first_tokens(folder) == []):
            del body["config"]["bos"]
        return body

    def source_identity(self) -> dict[str, Any]:
        """Return what is read of the source, and name, size and sha256 of each file, in order."""
        settings = self.source.model_dump(mode="json", exclude={"paths"})
        return {"source": settings | {"files": self.source.identity()}}
