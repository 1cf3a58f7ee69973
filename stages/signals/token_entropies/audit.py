"""What an audit asks of a live model about rows of ``token_entropies``: entropies, made again."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from schemas.scored_spans import SCORED
from schemas.tables.token_entropies import TokenEntropies
from stages.models.engines.engine import open_model
from stages.signals.scoring.agreement import (
    NATS,
    Answer,
    Ask,
    Compared,
    F64Array,
    Measure,
    Question,
    Row,
    beyond_float16,
    of_other_shape,
)
from stages.signals.scoring.logits import LogitBlocks
from stages.signals.scoring.states import scored_states, sequences_of, spanned_of
from stages.signals.token_entropies.stage import TokenEntropiesStage
from stages.signals.token_entropies.work import entropies
from stages.stage import Rejected, StageContext

_COLUMN = "token_entropies_P"


def measures(stage: TokenEntropiesStage) -> dict[str, Measure]:
    """Return what is compared: one number a position."""
    return {_COLUMN: Measure("nats", "entropy", NATS)}


def questions(
    stage: TokenEntropiesStage, context: StageContext, rows: pa.Table, most: int | None
) -> list[Question]:
    """Return what to ask about some rows of the input: all of each."""
    asked = []
    for batch in rows.to_batches():
        for at in range(batch.num_rows):
            one = batch.slice(at, 1)
            ((sample_id, ids_T),) = sequences_of(one)
            num, num_read = len(ids_T) - 1, len(ids_T)
            if SCORED in batch.schema.names:
                (spanned,) = spanned_of(one)
                num, num_read = len(spanned.targets_P), len(spanned.read_T)
            expected = {"number of positions": num}
            row = pa.Table.from_batches([one])
            asked.append(Question(sample_id, row, num_read, np.arange(num), expected))
    return asked


@contextmanager
def open_live(stage: TokenEntropiesStage, context: StageContext) -> Iterator[Ask]:
    """Open the model for single rows."""
    model = context.models[stage.model]
    with open_model(model, context.engine, share_prefixes=False) as engine:
        blocks = LogitBlocks(engine.head)

        def ask(asked: Sequence[Question]) -> Iterable[Answer | Rejected]:
            rows = pa.concat_tables([question.rows for question in asked])
            states = scored_states(engine, rows, context.engine)
            for question, row in zip(asked, states, strict=True):
                found: Any = row
                if not isinstance(row, Rejected):
                    found = entropies(blocks, row.asked, row.hidden_PD)
                yield found if isinstance(found, Rejected) else Live(question, found)

        yield ask


@dataclass(frozen=True, slots=True)
class Live:
    """Entropies of one row by a live model, float32."""

    question: Question
    row: TokenEntropies

    def beside(self, stored: Row) -> Compared:
        """Compare with the stored row, beyond what float16 rounds."""
        stored_P = np.asarray(stored[_COLUMN])
        other = of_other_shape(self.question, {"number of positions": len(stored_P)})
        if other is not None:
            return other
        live_P = np.asarray(self.row.token_entropies_P, np.float64)
        return Compared(
            sample_id=self.question.sample_id,
            places_P=self.question.places_P,
            apart={_COLUMN: beyond_float16(stored_P, live_P)},
            stored_P=stored_P.astype(np.float64),
            live_P=live_P,
        )

    def beside_live(self, other: "Live", stored: Row) -> dict[str, F64Array]:
        """Return how far two passes are apart."""
        one, two = (np.asarray(each.row.token_entropies_P, np.float64) for each in (self, other))
        return {_COLUMN: np.abs(one - two)}
