"""Divergence from a cached teacher, mixed with cross-entropy: ``w T^2 D(p, s) + (1 - w) CE``.

Hinton et al. 2015 (arXiv 1503.02531), their soft target. D is the forward KL at temperature 1
unless the recipe says otherwise, and what that is for each encoding is in ``losses.kl``. Other
divergences and temperatures need the whole distribution of a position, so ``exact`` alone allows
them; they are defined in ``losses.divergences``.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from schemas.errors import ConfigError
from stages.stage import StageConfig
from stages.student.objectives.objective import TEXT, Objective, Reads, TableKind

if TYPE_CHECKING:
    from stages.student.batches.training_data import Batches, TrainingData
    from stages.student.losses.step import Step, Term


class ForwardKl(StageConfig):
    """``KL(p || s)``, the default."""

    kind: Literal["forward_kl"] = "forward_kl"


class ReverseKl(StageConfig):
    """``KL(s || p)``."""

    kind: Literal["reverse_kl"]


class SkewedKl(StageConfig):
    """``KL(p || alpha p + (1 - alpha) s)``."""

    kind: Literal["skewed_kl"]
    alpha: float = Field(default=0.1, gt=0.0, lt=1.0)


class SkewedReverseKl(StageConfig):
    """``KL(s || (1 - alpha) p + alpha s)``."""

    kind: Literal["skewed_reverse_kl"]
    alpha: float = Field(default=0.1, gt=0.0, lt=1.0)


class JensenShannon(StageConfig):
    """``beta KL(p || m) + (1 - beta) KL(s || m)`` with ``m = beta p + (1 - beta) s``."""

    kind: Literal["jensen_shannon"]
    beta: float = Field(default=0.5, gt=0.0, lt=1.0)


class TotalVariation(StageConfig):
    """Half the sum of ``|p - s|``."""

    kind: Literal["total_variation"]


Divergence = Annotated[
    ForwardKl | ReverseKl | SkewedKl | SkewedReverseKl | JensenShannon | TotalVariation,
    Field(discriminator="kind"),
]


class KdConfig(Objective):
    """The divergence from the cached teacher with weight ``weight``, cross-entropy with the rest.

    Both distributions are taken at ``temperature``, cross-entropy at 1.
    """

    PACKS: ClassVar[bool] = True
    SHARDS: ClassVar[bool] = True

    loss: Literal["kd"] = "kd"
    weight: float = Field(default=1.0, gt=0.0, le=1.0)
    divergence: Divergence = ForwardKl()
    temperature: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what came later and is as it was, so that runs without it keep their names."""
        given: dict[str, Any] = dump(self)
        for name in ("divergence", "temperature"):
            if getattr(self, name) == type(self).model_fields[name].default:
                del given[name]
        return given

    @property
    def is_plain(self) -> bool:
        """Whether it is the KL that every encoding has."""
        return isinstance(self.divergence, ForwardKl) and self.temperature == 1.0

    @property
    def reads(self) -> Reads:
        """The rows and the teacher's distributions."""
        return Reads(data=("teacher_logits",), rows=TEXT)

    def require(self, data: Sequence[TableKind], lm_data: Sequence[TableKind]) -> None:
        """Refuse, beside other tables, an encoding that does not hold what is asked for."""
        super().require(data, lm_data)
        (encoding,) = (variant for table, variant in data if table == "teacher_logits")
        if self.is_plain or encoding == "exact":
            return
        asked = self.divergence.kind
        if self.temperature != 1.0:
            asked += f" at temperature {self.temperature:g}"
        raise ConfigError(
            f"data: objective 'kd' asks for {asked}, which needs whole distributions, and the "
            f"teacher_logits are of encoding {encoding}: that has forward_kl at temperature 1 "
            f"alone; take 'encoding: {{kind: exact}}', or leave divergence and temperature out"
        )

    def batches(self, data: "TrainingData") -> "Batches":
        """Return the rows with the teacher's distributions."""
        return data.rows(data.signals())

    def terms(self, batch: dict[str, Any], step: "Step") -> "list[Term]":
        """Return the loss of one batch."""
        from stages.student.losses.divergences import MEASURES, KdByDivergence  # both load torch
        from stages.student.losses.kl import ExactTeacher, Kd, teacher_of

        teacher, next_N = teacher_of(batch, step.teacher_head), batch["next_token_ids_N"]
        if self.is_plain:
            return [step.over_positions(batch, Kd(next_N, teacher, self.weight))]
        assert isinstance(teacher, ExactTeacher), "another encoding is refused"
        measure, power = MEASURES[self.divergence.kind]
        measure = partial(measure, **self.divergence.model_dump(exclude={"kind"}))
        loss = KdByDivergence(next_N, teacher, self.weight, measure, self.temperature, power)
        return [step.over_positions(batch, loss)]
