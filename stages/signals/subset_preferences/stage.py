"""Stage ``subset_preferences``: episodes -> how well the teacher does with fewer demonstrations.

BiAlign (arXiv 2312.17055) draws the subsets at random (v2, section 3.2) or with different numbers
of demonstrations that are like the test input (v3). It does so inside the training loop; here the
draw is made once, from ``seed`` and the episode's content, and stored.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from schemas.storage.manifest import Manifest
from schemas.table import BoundTable, Table
from schemas.tables.episodes import EPISODES
from schemas.tables.subset_preferences import SUBSET_PREFERENCES
from stages.stage import Estimate, SignalStage, StageConfig, StageContext


class UniformSampler(StageConfig):
    """Distinct subsets, each equally likely; the empty one only with ``allow_empty``."""

    kind: Literal["uniform"] = "uniform"
    allow_empty: bool = False


class SimilaritySampler(StageConfig):
    """Subsets with different numbers of demonstrations that are like the query.

    ``encoder`` names a sentence encoder among the recipe's models. The more similar half of the
    demonstrations (rounded up) counts as similar; the paper gives neither encoder nor rule.
    """

    kind: Literal["similarity"]
    encoder: str = Field(exclude=True)  # hashed by what the model is, not by what it is called
    allow_empty: bool = False


Sampler = Annotated[UniformSampler | SimilaritySampler, Field(discriminator="kind")]


class SubsetPreferencesStage(SignalStage):
    """Score ``num_subsets`` distinct subsets of each episode of step ``input`` with ``model``.

    Scores within ``tie_tolerance`` nats of the next one share a rank; half-precision teachers move
    a score by about that much.
    """

    VERSION: ClassVar[int] = 1
    CONSUMES: ClassVar[tuple[Table[Any], ...]] = (EPISODES,)
    ALSO_RUNS: ClassVar[tuple[str, ...]] = ("sampler.encoder",)

    stage: Literal["subset_preferences"]
    num_subsets: int = Field(default=4, ge=2)
    sampler: Sampler = UniformSampler()
    tie_tolerance: float = Field(default=1e-3, ge=0.0)
    seed: int = 0

    @property
    def table(self) -> Table[Any]:
        """``subset_preferences``."""
        return SUBSET_PREFERENCES

    def bind(self, context: StageContext) -> BoundTable[Any]:
        """No column depends on the model."""
        return SUBSET_PREFERENCES.bind(vocab_size=context.vocab_size)

    def estimate(self, source: Manifest, *, hidden_size: int) -> Estimate:
        """N scores a row, with the indices of some three demonstrations each."""
        positions = source.num_rows * self.num_subsets
        return Estimate(positions, positions * 10 + source.num_rows * 30)
