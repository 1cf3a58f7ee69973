"""Stage ``teacher_logits``: token sequences -> what the teacher predicts at every position.

Of documents and episodes every position is scored, of preference pairs those of the two responses,
and of conversations and ``demonstrations``, whose rows name spans of their own, those of the spans.
An encoder-decoder scores demonstrations alone, and of their spans what its decoder says: the
answer, or the query of a row without one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from schemas.errors import ConfigError
from schemas.storage.manifest import Manifest
from schemas.table import BoundTable, Table
from schemas.tables.conversations import CONVERSATIONS
from schemas.tables.demonstrations import DEMONSTRATIONS
from schemas.tables.documents import DOCUMENTS
from schemas.tables.episodes import EPISODES
from schemas.tables.preference_pairs import PREFERENCE_PAIRS
from schemas.tables.teacher_logits import ENCODINGS, EXACT_INT8, THRESHOLD_TAU
from stages.models.encoder_decoder.kind import is_encoder_decoder
from stages.signals.teacher_logits.calibration import CALIBRATION
from stages.stage import Estimate, SignalStage, StageConfig, StageContext, TableRef

EXACT_FILES = ("head.safetensors", "head.json")
MOST = 255  # entries of a position: counts are stored in 8 bits
# ``mean_k`` becomes tau over the first rows of the input: whole ones, until they come to so many.
CALIBRATED_OVER = {"positions": 4096, "tokens": 65536}


class ThresholdEncoding(StageConfig):
    """A sample of each distribution, unbiased (the default): see ``schemas.distribution``.

    With ``tau``, one constant of the table, the number of entries follows the position: the most
    probable tokens down to p = tau, and of the others one for each tau of their mass, together at
    most ``max_k``. With ``mean_k`` the tau is found at which positions have so many on average
    (``teacher_logits.tau``). With ``k`` every position has as many. Without any, tau is 0.04.

    ``layout`` ``packed`` stores the same rows entropy coded, for tau alone (``schemas.packing``);
    the package ``constriction`` writes and reads them.
    """

    kind: Literal["threshold"] = "threshold"
    tau: float | None = Field(default=None, gt=0.0, le=1.0)
    max_k: int | None = Field(default=None, ge=1, le=MOST)
    mean_k: float | None = Field(default=None, ge=1.0, le=MOST)
    k: int | None = Field(default=None, ge=2, le=MOST)
    layout: Literal["plain", "packed"] = "plain"

    @model_validator(mode="before")
    @classmethod
    def _tau_unless_k(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("k") is None:
            rule = {"tau": 0.04} if given.get("mean_k") is None else {}
            return {**rule, "max_k": 64, **given}
        return given

    @model_validator(mode="after")
    def _one_rule(self) -> "ThresholdEncoding":
        if self.k is not None:
            if any(other is not None for other in (self.tau, self.max_k, self.mean_k)):
                raise ValueError(
                    f"k is {self.k} beside tau, mean_k or max_k: k keeps so many entries of every "
                    f"position, the others let their number follow the position; give one of them"
                )
            if self.layout == "packed":
                raise ValueError(
                    f"layout packed stores entries by tau, and k is {self.k}: give tau or mean_k"
                )
            return self
        if self.max_k is None or (self.tau is None and self.mean_k is None):
            raise ValueError("tau and max_k are numbers: leave them out for their defaults")
        if self.mean_k is not None and self.tau is not None:
            raise ValueError(
                f"mean_k is {self.mean_k:g} beside tau {self.tau:g}: mean_k finds its tau; give "
                f"one of them"
            )
        if self.mean_k is not None and self.mean_k > self.max_k:
            raise ValueError(
                f"mean_k is {self.mean_k:g}, above max_k {self.max_k}, which no position exceeds: "
                f"lower mean_k or raise max_k (up to {MOST})"
            )
        return self

    @model_serializer(mode="wrap")
    def _given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is not used, so that tables without it keep their fingerprints."""
        given = {name: value for name, value in dump(self).items() if value is not None}
        if self.layout == "plain":
            del given["layout"]
        return given

    def most(self, vocab_size: int) -> int:
        """Return what no position exceeds: ``sum_v min(1, p_v / tau)`` is at most 1 / tau."""
        if self.max_k is None:
            assert self.k is not None
            return self.k
        if self.tau is None:
            return min(self.max_k, vocab_size)
        return min(self.max_k, math.ceil(1.0 / self.tau - 1e-6), vocab_size)


class TopKEncoding(StageConfig):
    """The ``k`` largest log-probs and the mass of the rest: biased, a lower bound of the KL."""

    kind: Literal["top_k"]
    k: int = Field(default=50, ge=1)


class ExactEncoding(StageConfig):
    """Final hidden states in float16, and the head once: the full vocabulary, 2 D bytes a token.

    With ``mean_kl`` the states of each row are rounded to whole steps, the longest at which the
    teacher is so many nats from itself unrounded, on average over the row: about D bytes a token.
    """

    kind: Literal["exact"]
    mean_kl: float | None = Field(default=None, ge=1e-6, le=1e-2)

    @model_serializer(mode="wrap")
    def _given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is not used, so that tables without it keep their fingerprints."""
        return {name: value for name, value in dump(self).items() if value is not None}


Encoding = Annotated[ThresholdEncoding | TopKEncoding | ExactEncoding, Field(discriminator="kind")]


class TeacherLogitsStage(SignalStage):
    """Score the rows of step ``input`` with ``model``, keep each distribution as ``encoding``.

    ``seed`` moves every random draw; equal seeds give equal draws on any number of workers.
    """

    VERSION: ClassVar[int] = 3
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
        match self.encoding:
            case ThresholdEncoding(k=None):
                return THRESHOLD_TAU
            case ExactEncoding(mean_kl=float()):
                return EXACT_INT8
            case encoding:
                return ENCODINGS[encoding.kind]

    @property
    def mean_k(self) -> float | None:
        """The mean number of entries that tau is to be found for; None: it is known, or none is."""
        return self.encoding.mean_k if isinstance(self.encoding, ThresholdEncoding) else None

    def hashed(self) -> dict[str, Any]:
        """Return what names the step by content: with ``mean_k``, how tau is found, not tau.

        A step has its name before its teacher runs. The tau that was found is in the record of each
        shard and in a side file, which the manifest names.
        """
        body = super().hashed()
        if self.mean_k is not None:
            body["config"]["calibrated_over"] = CALIBRATED_OVER
        return body

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
        """What lies once beside the shards: the head that ``exact`` is read with, a found tau."""
        if self.encoding.kind == "exact":
            return EXACT_FILES
        return () if self.mean_k is None else (CALIBRATION,)

    def bind(self, context: StageContext) -> BoundTable[Any]:
        """Token id width from the vocabulary, K from the encoding, D from the head."""
        if self.mean_k is not None and self.mean_k > context.vocab_size:
            raise ConfigError(
                f"encoding.mean_k is {self.mean_k:g}, the vocabulary has {context.vocab_size} "
                f"tokens: lower mean_k"
            )
        if isinstance(self.encoding, ExactEncoding):
            width = context.models[self.model].hidden_size
            return self.table.bind(vocab_size=context.vocab_size, sizes={"D": width})
        if isinstance(self.encoding, ThresholdEncoding) and self.encoding.k is None:
            packed = self.encoding.layout == "packed"
            return self.table.bind(vocab_size=context.vocab_size, packed=packed)
        k = self.encoding.k
        assert k is not None
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
        byte, and the two float16 columns hardly at all. With tau, chat had 0.3 / tau entries a
        position and web pages 0.55 / tau, of 1.6 bytes each at 49,152 tokens; 0.5 / tau is taken,
        and ``mean_k`` as it is. The packed layout takes four fifths of that.
        """
        id_bytes = 0.9 * math.log2(source.vocab_size) / 8
        match self.encoding:
            case ThresholdEncoding(k=int(k)):
                per_position = k * (id_bytes + 0.3) + 4.5
            case ThresholdEncoding(tau=tau, max_k=max_k, mean_k=mean_k, layout=layout):
                mean = mean_k or min(0.5 / (tau or 1.0), max_k or MOST)
                per_position = mean * (id_bytes - 0.15) + 3.6
                per_position *= 0.82 if layout == "packed" else 1.0
            case ExactEncoding(mean_kl=None):
                per_position = 2.0 * hidden_size * 0.95 + 4.5
            case ExactEncoding():
                per_position = 1.0 * hidden_size + 4.5
            case encoding:
                per_position = encoding.k * (id_bytes + 1.8) + 6.0
        positions = source.num_tokens - source.num_rows
        if source.table in (DEMONSTRATIONS.name, CONVERSATIONS.name):
            positions = source.num_positions
        return Estimate(positions, math.ceil(positions * per_position))
