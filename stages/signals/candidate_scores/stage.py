"""Stage ``candidate_scores``: episodes -> the teacher's log-prob of each candidate answer."""

from typing import Any, ClassVar, Literal

from schemas.storage.manifest import Manifest
from schemas.table import BoundTable, Table
from schemas.tables.candidate_scores import CANDIDATE_SCORES
from schemas.tables.episodes import EPISODES
from stages.stage import Estimate, SignalStage, StageContext

_CANDIDATES_A_ROW = 6


class CandidateScoresStage(SignalStage):
    """Score every candidate of the episodes of step ``input`` with ``model``.

    A generation episode, which has no candidates, gets one score: its answer's.
    """

    VERSION: ClassVar[int] = 2
    CONSUMES: ClassVar[tuple[Table[Any], ...]] = (EPISODES,)

    stage: Literal["candidate_scores"]

    @property
    def table(self) -> Table[Any]:
        """``candidate_scores``."""
        return CANDIDATE_SCORES

    def bind(self, context: StageContext) -> BoundTable[Any]:
        """No column depends on the model."""
        return CANDIDATE_SCORES.bind(vocab_size=context.vocab_size)

    def estimate(self, source: Manifest, *, hidden_size: int) -> Estimate:
        """Guess: a handful of candidates a row, each a float32 and a small number."""
        positions = source.num_rows * _CANDIDATES_A_ROW
        return Estimate(positions, positions * 5 + source.num_rows * 30)
