"""Stage ``preference_pairs``: prompts with two responses each -> the ``preference_pairs`` table.

This file is the stage's configuration, so that ``plan`` and ``status`` start without ``datasets``,
``polars`` and ``transformers``; ``stages.ingest.pair_preparation`` is the work.

Data as DPO, DCKD and ADPA (arXiv 2502.17927, section 4.1) take it: the prompt is all turns but the
last, the response the last one. Where we differ from the published code: the chat template is
applied once, to text, and ids are kept, so no model sees a second BOS; the token that ends the
assistant's turn is part of a finished response; a response cut to length is marked as such.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from schemas.table import Table
from schemas.tables.preference_pairs import PREFERENCE_PAIRS, PreferencePair
from stages.ingest.pair_sources import PairSource, settings_of
from stages.ingest.prepared import PreparedShards
from stages.stage import OnProgress, SourceStage


class PreferencePairsStage(SourceStage):
    """Read pairs, check them, apply the chat template, tokenise, split by content of the prompt.

    ``template`` is the tokenizer's own (``chat``), or none at all (``plain``: the prompt's text,
    then the response's, then EOS). Lengths are in tokens. A prompt that is too long loses its
    earliest turns; ``long_responses`` says whether a response that is too long costs its row or its
    end. ``max_rows`` keeps a sample of that many rows, train and held-out in proportion.
    """

    VERSION: ClassVar[int] = 1

    stage: Literal["preference_pairs"]
    source: PairSource
    template: Literal["chat", "plain"] = "chat"
    max_prompt_length: int = Field(ge=1)
    max_response_length: int = Field(ge=1)
    long_responses: Literal["reject", "truncate"] = "reject"
    heldout_fraction: float = Field(ge=0.0, lt=1.0)
    rows_per_shard: int = Field(default=256, ge=1)
    max_rows: int | None = Field(default=None, ge=2)

    @property
    def table(self) -> Table[Any]:
        """The table this stage writes."""
        return PREFERENCE_PAIRS

    def source_identity(self) -> dict[str, Any]:
        """Return what is read of the source, and name, size and sha256 of each file, in order."""
        return {"source": settings_of(self.source)}

    def prepare(self, work_dir: Path, *, on_progress: OnProgress | None = None) -> PreparedShards:
        """Make all rows, in ``work_dir``; returns at once where they are made already.

        Rows are held in memory. Starts afresh when the configuration, a file or the tokenizer is
        another one; raises ConfigError for a malformed record or where no row is left.
        """
        from stages.ingest.pair_preparation import prepare_pairs  # loads heavy libraries

        return prepare_pairs(self, work_dir, on_progress or (lambda line: None))

    def read(self, work_dir: Path, index: int) -> Iterator[PreferencePair]:
        """Yield the rows of shard ``index`` of a prepared ``work_dir``."""
        from stages.ingest.pair_preparation import read_prepared_pairs

        yield from read_prepared_pairs(work_dir, index)
