"""Stage ``advantages``: a student's responses -> how much an aligned teacher prefers each token.

``model`` is the aligned teacher, ``reference`` the teacher that the alignment started from; both
score every position of the responses (ADPA, arXiv 2502.17927). What each support keeps is in
``schemas.tables.prompted.advantages``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from schemas.errors import ConfigError
from schemas.storage.manifest import Manifest
from schemas.table import BoundTable, Table
from schemas.tables.prompted.advantages import HEAD_FOLDERS, SUPPORTS, THRESHOLD_TAU
from schemas.tables.prompted.responses import RESPONSES
from stages.stage import Estimate, SignalStage, StageConfig, StageContext, TableRef

MOST = 255  # tokens of a position: their numbers are stored in 8 bits
_HEAD_FILES = ("head.safetensors", "head.json")


class ThresholdSupport(StageConfig):
    """Tokens drawn so that sums over them are unbiased (the default): see ``drawing``.

    With ``tau``, one constant of the table in nats before beta, the number of tokens follows the
    position: where ``m |A - c|`` is at least tau a token is sure, of the others there is about one
    for each tau of their sum, and together at most ``max_k``. With ``k`` every position has as
    many. Without either, tau is 0.002.
    """

    kind: Literal["threshold"] = "threshold"
    tau: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    max_k: int | None = Field(default=None, ge=1, le=MOST)
    k: int | None = Field(default=None, ge=2)

    @model_validator(mode="before")
    @classmethod
    def _tau_unless_k(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("k") is None:
            return {"tau": 0.002, "max_k": 64, **given}
        return given

    @model_validator(mode="after")
    def _one_rule(self) -> "ThresholdSupport":
        if self.k is not None and (self.tau is not None or self.max_k is not None):
            raise ValueError(
                f"k is {self.k} beside tau or max_k: k keeps so many tokens of every position, "
                f"tau lets their number follow the position; give one of them"
            )
        if self.k is None and (self.tau is None or self.max_k is None):
            raise ValueError("tau and max_k are numbers: leave them out for their defaults")
        return self

    @model_serializer(mode="wrap")
    def _given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the rule that is not used."""
        return {name: value for name, value in dump(self).items() if value is not None}


class UnionTopKSupport(StageConfig):
    """The ``k`` likeliest tokens of each of the three models, and the others as one."""

    kind: Literal["union_top_k"]
    k: int = Field(default=16, ge=1)


class ReleasedSupport(StageConfig):
    """The aligned teacher's ``k`` likeliest tokens, missing reference values floored: published."""

    kind: Literal["as_released"]
    k: int = Field(default=50, ge=1)


class ExactSupport(StageConfig):
    """Both models' final hidden states in float32, and their heads once: the full vocabulary."""

    kind: Literal["exact"]


Support = Annotated[
    ThresholdSupport | UnionTopKSupport | ReleasedSupport | ExactSupport,
    Field(discriminator="kind"),
]


class AdvantagesStage(SignalStage):
    """Score the responses of step ``input`` with ``model`` and ``reference``.

    An advantage is ``beta (log p_model - log p_reference)``, in nats; beta is that of the DPO run
    that made ``model``. ``as_released`` has none and takes 1. ``seed`` moves the draws of
    ``threshold``. A reference that is the model itself makes all advantages 0 and is refused unless
    ``allow_equal_models``.
    """

    VERSION: ClassVar[int] = 3
    CONSUMES: ClassVar[tuple[Table[Any], ...]] = (RESPONSES,)
    NOT_HASHED: ClassVar[tuple[str, ...]] = (
        *SignalStage.NOT_HASHED,
        "reference",
        "allow_equal_models",
    )
    RUNS: ClassVar[tuple[str, ...]] = ("model", "reference")

    stage: Literal["advantages"]
    reference: str
    beta: float = Field(gt=0.0, allow_inf_nan=False)
    support: Support = ThresholdSupport()
    seed: int = 0
    allow_equal_models: bool = False

    @model_validator(mode="after")
    def _released_code_has_no_beta(self) -> "AdvantagesStage":
        if isinstance(self.support, ReleasedSupport) and self.beta != 1.0:
            raise ValueError(
                f"beta is {self.beta:g}, support 'as_released' is the published code's, which has "
                f"none: set it to 1"
            )
        return self

    @property
    def table(self) -> Table[Any]:
        """``advantages`` in the variant that the support names."""
        follows = isinstance(self.support, ThresholdSupport) and self.support.tau is not None
        return THRESHOLD_TAU if follows else SUPPORTS[self.support.kind]

    def check(self, tables: Sequence[TableRef], models: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse a reference that is the aligned teacher itself, too."""
        super().check(tables, models)
        same = models[self.model] == models[self.reference]
        if same and not self.allow_equal_models:
            raise ConfigError(
                f"reference: '{self.reference}' is the aligned teacher '{self.model}' itself, so "
                f"all advantages would be 0: name the model that it was aligned from, or set "
                f"allow_equal_models"
            )

    @property
    def side_files(self) -> tuple[str, ...]:
        """``exact`` needs both head matrices to be read back; they lie once beside the shards."""
        if self.support.kind != "exact":
            return ()
        return tuple(f"{folder}/{file}" for folder in HEAD_FOLDERS for file in _HEAD_FILES)

    def bind(self, context: StageContext) -> BoundTable[Any]:
        """Token id width from the vocabulary, K from the support, D and R from the two heads."""
        if isinstance(self.support, ExactSupport):
            teacher, reference = (context.models[name] for name in (self.model, self.reference))
            sizes = {"D": teacher.hidden_size, "R": reference.hidden_size}
            return self.table.bind(vocab_size=context.vocab_size, sizes=sizes)
        k = self.support.k
        if k is None:
            return self.table.bind(vocab_size=context.vocab_size)
        if k > context.vocab_size:
            raise ConfigError(
                f"support.k is {k}, the vocabulary has {context.vocab_size} tokens: lower k"
            )
        return self.table.bind(vocab_size=context.vocab_size, sizes={"K": k})

    def estimate(self, source: Manifest, *, hidden_size: int) -> Estimate:
        """One position a response token; real responses came within a tenth of the bytes.

        The reference is taken to be as wide as the aligned teacher. Of the union's 3 k tokens a
        third were distinct. With tau, a teacher that had drifted from its reference by 0.1 nats
        where the student looks had ``0.21 tau^-0.65`` tokens a position; one that drifted further
        has more.
        """
        id_bytes = 0.9 * math.log2(source.vocab_size) / 8
        match self.support:
            case ThresholdSupport(tau=float(tau), max_k=int(max_k)):
                per_position = min(0.21 * tau**-0.65, max_k) * (id_bytes + 0.4) + 6.0
            case ThresholdSupport(k=int(k)):
                per_position = k * (id_bytes + 2.5) + 4.0
            case UnionTopKSupport(k=k):
                per_position = k * (id_bytes + 1.8) + 7.0
            case ReleasedSupport(k=k):
                per_position = k * (id_bytes + 1.6) + 4.0
            case _:
                per_position = 2 * 4.0 * hidden_size * 0.93
        positions = source.num_positions
        return Estimate(positions, math.ceil(positions * per_position))
