"""One table a file: what its rows hold; ``TABLES`` is the list of all."""

from typing import Any

from ..table import Table
from .advantages import SUPPORTS
from .aligned_spans import ALIGNED_ENTRIES, ALIGNED_SPANS
from .candidate_scores import CANDIDATE_SCORES
from .conversations import CONVERSATIONS
from .demonstrations import DEMONSTRATIONS
from .documents import DOCUMENTS
from .episodes import EPISODES
from .preference_pairs import PREFERENCE_PAIRS
from .response_logprobs import RESPONSE_LOGPROBS
from .response_token_logprobs import RESPONSE_TOKEN_LOGPROBS
from .responses import RESPONSES
from .subset_preferences import SUBSET_PREFERENCES
from .teacher_logits import ENCODINGS

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
    ALIGNED_SPANS,
    ALIGNED_ENTRIES,
    *SUPPORTS.values(),
)
TABLES: dict[tuple[str, str], Table[Any]] = {(table.name, table.variant): table for table in _KNOWN}
