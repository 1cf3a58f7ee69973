"""The work of ``token_entropies``: final hidden states -> logits, a block at a time -> entropies.

Which positions are scored is in ``stages.signals.scoring.states``; of each, one number is kept.

Dimensions: P = scored positions, V = vocabulary, D = hidden width.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from schemas.tables.token_entropies import TokenEntropies
from stages.models.causal_lm.language_head import LanguageHead
from stages.models.engines.engine import open_model
from stages.signals.scoring.encoding import cache_slices, measure
from stages.signals.scoring.logits import LogitBlocks
from stages.signals.scoring.states import Asked, Rows, scored_states
from stages.signals.token_entropies.stage import TokenEntropiesStage
from stages.stage import Later, Rejected, StageContext, Work

Measured = TokenEntropies | Rejected


@contextmanager
def open_work(stage: TokenEntropiesStage, context: StageContext) -> Iterator[Work]:
    """Start the engine of ``stage.model``; the work measures one shard of token sequences."""
    model = context.models[stage.model]
    with open_model(model, context.engine, share_prefixes=False) as engine:
        context.notes["head_check"] = engine.head_check

        def work(shard: pa.Table) -> Iterable[Measured | Later]:
            return measured(engine.head, scored_states(engine, shard, context.engine))

        yield work


def measured(head: LanguageHead, rows: Rows) -> Iterator[Measured | Later]:
    """Yield the entropies of each row, and the rejections as they are."""
    blocks = LogitBlocks(head)
    for row in rows:
        if isinstance(row, Rejected):
            yield row
        else:
            yield blocks.later(row.hidden_PD, partial(entropies, blocks, row.asked))


def entropies(blocks: LogitBlocks, asked: Asked, hidden_PD: Tensor) -> Measured:
    """Return one row, its entropies float32, which the table stores as float16."""
    targets_P = torch.from_numpy(asked.targets_P).to(blocks.head.weight_VD.device)
    found = []
    for start, logits_PV in blocks.of(hidden_PD):
        for part in cache_slices(logits_PV):
            at = slice(start + part.start, start + part.stop)
            block = measure(logits_PV[part], targets_P[at])
            if not block.finite:
                return Rejected(asked.sample_id, "non-finite logits")
            found.append(block.entropies_P.cpu().numpy())
    return TokenEntropies(sample_id=asked.sample_id, token_entropies_P=np.concatenate(found))
