"""Stage ``token_files``: files of token ids -> ``documents``, or ``conversations`` where masked.

A shard is made of a fixed range of the files' rows, known from their headers, by any worker: there
is no shuffle, so rows keep the order of the files and a run may be as wide as there are shards.
Files without a mask and without labels become ``documents``. With one of them rows become
``conversations``: what is masked in, or has a label, is scored. Labels stand at their own token
(``labels[t]`` is ``input_ids[t]`` or -100).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from schemas.errors import ConfigError
from schemas.table import Table
from schemas.tables.conversations import CONVERSATIONS
from schemas.tables.documents import DOCUMENTS
from stages.file_map import FileMapStage, Piece
from stages.sources.reading.source import Patterns
from stages.stage import Estimate, StageConfig, TableRef


class ColumnFiles(StageConfig):
    """Parquet or Arrow files (IPC files and streams), token ids in a list a row.

    ``mask`` names a column of 0 and 1, or of booleans, ``labels`` one of ids and -100.
    """

    kind: Literal["parquet", "arrow"]
    paths: Patterns
    column: str = "input_ids"
    mask: str | None = None
    labels: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "ColumnFiles":
        if self.mask is not None and self.labels is not None:
            raise ValueError("'mask' and 'labels' both say what is scored: give one of them")
        return self

    @property
    def is_masked(self) -> bool:
        """Whether rows say which of their tokens are scored."""
        return self.mask is not None or self.labels is not None


class MegatronFiles(StageConfig):
    """Pairs ``NAME.bin`` and ``NAME.idx`` of Megatron-LM's IndexedDataset, a document a row."""

    kind: Literal["megatron"]
    paths: Patterns

    @property
    def is_masked(self) -> bool:
        """They hold no mask."""
        return False


class DatatroveFiles(StageConfig):
    """Files ``NAME.ds`` of datatrove, each with its ``NAME.ds.index``, a document a row.

    ``mask`` says whether ``NAME.ds.loss`` is read; it has to be said where there is one.
    """

    kind: Literal["datatrove"]
    paths: Patterns
    mask: bool | None = None

    @property
    def is_masked(self) -> bool:
        """Whether rows say which of their tokens are scored."""
        return self.mask is True


TokenSource = Annotated[ColumnFiles | MegatronFiles | DatatroveFiles, Field(discriminator="kind")]


class TokenFilesStage(FileMapStage):
    """Read token ids from ``source`` as they stand; ``tokenizer`` is the model whose ids they are.

    ``as_given`` makes a row of each row of a file and rejects those of more than ``length`` tokens,
    ``truncate`` keeps their first ``length``. ``pack`` joins documents, each followed by the
    end-of-sequence token unless it ends with it, and cuts each shard's into rows of exactly
    ``length``; the last piece of a shard is dropped and counted as ``packing_remainder``.

    Equal token ids are on one side, whichever files they are in: a row (of ``pack``: a document) is
    held out by a hash of them. ``rows_per_shard`` counts rows of the files.
    """

    VERSION: ClassVar[int] = 1

    stage: Literal["token_files"]
    source: TokenSource
    length: int = Field(ge=2)
    mode: Literal["as_given", "truncate", "pack"] = "as_given"
    heldout_fraction: float = Field(ge=0.0, lt=1.0)
    rows_per_shard: int = Field(default=1024, ge=1)

    @model_validator(mode="after")
    def _no_packed_masks(self) -> "TokenFilesStage":
        if self.mode == "pack" and self.source.is_masked:
            raise ValueError(
                "mode: pack joins running text, and this source says which tokens are scored: use "
                "as_given or truncate"
            )
        return self

    @property
    def table(self) -> Table[Any]:
        """``conversations`` where the source says what is scored, else ``documents``."""
        return CONVERSATIONS if self.source.is_masked else DOCUMENTS

    def source_identity(self) -> dict[str, Any]:
        """Return what is read of the source, and name, size and sha256 of each file, in order."""
        from stages.sources.token_files.layout import identities

        settings = self.source.model_dump(mode="json", exclude={"paths"})
        return {"source": settings | {"files": identities(self.source)}}

    def check(self, tables: Sequence[TableRef], models: Any) -> None:
        """Refuse rows that are longer than the model's window."""
        from stages.sources.reading.tokens import model_limits

        _, most = model_limits(Path(self.tokenizer), 0)
        if self.length > most:
            raise ConfigError(
                f"length: got {self.length}, but the model in {self.tokenizer} takes at most "
                f"{most} tokens"
            )

    def pieces(self) -> Sequence[Piece]:
        """Return the ranges of the files' rows that each shard is made of."""
        from stages.sources.token_files.layout import cut_pieces

        return cut_pieces(self)

    def estimate(self, pieces: Sequence[Piece], *, vocab_size: int) -> Estimate:
        """Two or four bytes an id, compressed; which rows are left out is not known."""
        from stages.sources.token_files.layout import count_tokens

        id_bytes = 0.9 * math.log2(vocab_size) / 8
        return Estimate(0, math.ceil(count_tokens(self) * id_bytes))
