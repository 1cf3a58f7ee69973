"""Stage ``teacher_logits``: token sequences -> what the teacher predicts at every position.

Of documents and episodes every position is scored, of preference pairs those of the two responses,
and of conversations and ``demonstrations``, whose rows name spans of their own, those of the spans.
An encoder-decoder scores demonstrations alone, and of their spans what its decoder says: the
answer, or the query of a row without one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from schemas.errors import ConfigError
from schemas.storage.manifest import Manifest
from schemas.table import BoundTable, Table
from schemas.tables.conversations import CONVERSATIONS
from schemas.tables.demonstrations import DEMONSTRATIONS
from schemas.tables.documents import DOCUMENTS
from schemas.tables.episodes import EPISODES
from schemas.tables.preference_pairs import PREFERENCE_PAIRS
from schemas.tables.teacher_logits import ENCODINGS
from stages.models.encoder_decoder.kind import is_encoder_decoder
from stages.stage import Estimate, SignalStage, StageConfig, StageContext, TableRef

EXACT_FILES = ("head.safetensors", "head.json")


class ThresholdEncoding(StageConfig):
    """``k`` entries a position, unbiased (the default)."""

    kind: Literal["threshold"] = "threshold"
    k: int = Field(default=16, ge=2, le=255)


class TopKEncoding(StageConfig):
    """The ``k`` largest log-probs and the mass of the rest: biased, a lower bound of the KL."""

    kind: Literal["top_k"]
    k: int = Field(default=50, ge=1)


class ExactEncoding(StageConfig):
    """Final hidden states in float16, and the head once: the full vocabulary, 2 D bytes a token."""

    kind: Literal["exact"]


Encoding = Annotated[ThresholdEncoding | TopKEncoding | ExactEncoding, Field(discriminator="kind")]


class TeacherLogitsStage(SignalStage):
    """Score the rows of step ``input`` with ``model``, keep each distribution as ``encoding``.

    ``seed`` moves every random draw; equal seeds give equal draws on any number of workers.
    """

    VERSION: ClassVar[int] = 2
    CONSUMES: ClassVar[tuple[Table[Any], ...]] = (
        DOCUMENTS,
        EPISODES,
        CONVERSATIONS,
        DEMONSTRATIONS,
        PREFERENCE_PAIRS,
    )

    ENCODER_DECODERS: ClassVar[tuple[str, ...]] = ("model",)

    stage: Literal["teacher_logits"]
    encoding: Encoding = ThresholdEncoding()
    seed: int = 0

    @property
    def table(self) -> Table[Any]:
        """``teacher_logits`` in the variant that the encoding names."""
        return ENCODINGS[self.encoding.kind]

    def check(self, tables: Sequence[TableRef], models: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse a table that the stage does not read, or an encoder-decoder of this table."""
        super().check(tables, models)
        if is_encoder_decoder(models[self.model]) and tables[0].table is not DEMONSTRATIONS:
            raise ConfigError(
                f"input: step '{tables[0].step}' writes {tables[0].table.name}, and model "
                f"'{self.model}' is an encoder-decoder, which scores {DEMONSTRATIONS.name} alone: "
                f"name a step of that stage, or a causal language model"
            )

    @property
    def side_files(self) -> tuple[str, ...]:
        """``exact`` needs the head matrix to be read back; it lies once beside the shards."""
        return EXACT_FILES if self.encoding.kind == "exact" else ()

    def bind(self, context: StageContext) -> BoundTable[Any]:
        """Token id width from the vocabulary, K from the encoding, D from the head."""
        if isinstance(self.encoding, ExactEncoding):
            width = context.models[self.model].hidden_size
            return self.table.bind(vocab_size=context.vocab_size, sizes={"D": width})
        k = self.encoding.k
        if k > context.vocab_size:
            raise ConfigError(
                f"encoding.k is {k}, the vocabulary has {context.vocab_size} tokens: lower k"
            )
        return self.table.bind(vocab_size=context.vocab_size, sizes={"K": k})

    def estimate(self, source: Manifest, *, hidden_size: int) -> Estimate:
        """All positions but the first of each row; real text came within a tenth of the bytes.

        Prompts of preference pairs are not scored, nor queries by an encoder-decoder: both come to
        less.
        Ids compress to about nine tenths of log2(V) bits, head codes (some 0.3 a kept entry) to a
        byte, and the two float16 columns hardly at all.
        """
        id_bytes = 0.9 * math.log2(source.vocab_size) / 8
        match self.encoding:
            case ThresholdEncoding(k=k):
                per_position = k * (id_bytes + 0.3) + 4.5
            case ExactEncoding():
                per_position = 2.0 * hidden_size * 0.95 + 4.5
            case encoding:
                per_position = encoding.k * (id_bytes + 1.8) + 6.0
        positions = source.num_tokens - source.num_rows
        if source.table in (DEMONSTRATIONS.name, CONVERSATIONS.name):
            positions = source.num_positions
        return Estimate(positions, math.ceil(positions * per_position))
