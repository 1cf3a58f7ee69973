"""One table a file: what its rows hold; ``TABLES`` is the list of all."""

from typing import Any

from ..table import Table
from .aligned_spans import ALIGNED_ENTRIES, ALIGNED_SPANS
from .candidate_scores import CANDIDATE_SCORES
from .conversations import CONVERSATIONS
from .demonstrations import DEMONSTRATIONS
from .documents import DOCUMENTS
from .episodes import EPISODES
from .preference_pairs import PREFERENCE_PAIRS
from .prompted.advantages import SUPPORTS
from .prompted.response_logprobs import RESPONSE_LOGPROBS
from .prompted.response_token_logprobs import RESPONSE_TOKEN_LOGPROBS
from .prompted.responses import RESPONSES
from .span_masks import SPAN_MASKS
from .subset_preferences import SUBSET_PREFERENCES
from .teacher_logits import ENCODINGS
from .token_entropies import TOKEN_ENTROPIES

_KNOWN: tuple[Table[Any], ...] = (
    DOCUMENTS,
    EPISODES,
    CONVERSATIONS,
    DEMONSTRATIONS,
    SUBSET_PREFERENCES,
    CANDIDATE_SCORES,
    PREFERENCE_PAIRS,
    RESPONSES,
    RESPONSE_LOGPROBS,
    RESPONSE_TOKEN_LOGPROBS,
    *ENCODINGS.values(),
    TOKEN_ENTROPIES,
    SPAN_MASKS,
    ALIGNED_SPANS,
    ALIGNED_ENTRIES,
    *SUPPORTS.values(),
)
TABLES: dict[tuple[str, str], Table[Any]] = {(table.name, table.variant): table for table in _KNOWN}
