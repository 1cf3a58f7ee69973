"""Divergence from a cached teacher, mixed with cross-entropy: ``w T^2 D(p, s) + (1 - w) CE``.

Hinton et al. 2015 (arXiv 1503.02531), their soft target. D is the forward KL at temperature 1
unless the recipe says otherwise, and what that is for each encoding is in ``losses.kl``. Other
divergences and temperatures need the whole distribution of a position, so ``exact`` alone allows
them; they are defined in ``losses.divergences``.

Tables of rows, each before the signals about its rows, are several data sets: each row is taught by
the teachers of its own. Several teachers of one are a ``mixture`` (``losses.mixture``).

With ``positions`` the loss is taken at some of each row's positions (``selected_positions``).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from schemas.errors import ConfigError
from schemas.tables.teacher_logits import WHOLE
from stages.models.spec import is_one_model
from stages.stage import StageConfig, TableRef
from stages.student.batches.several_datasets import data_sets_of
from stages.student.objectives.objective import TEXT, Objective, Reads, TableKind
from stages.student.selected_positions import (
    ENTROPIES,
    TABLES,
    AtSelected,
    ByStudentEntropy,
    Positions,
)

if TYPE_CHECKING:
    from torch import Tensor

    from stages.models.causal_lm.chunked_loss import PositionLoss
    from stages.student.batches.training_data import Batches, TrainingData
    from stages.student.losses.kl import Teacher
    from stages.student.losses.step import Step, Term

TEACHER = "teacher_logits"


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


class Mixture(StageConfig):
    """Teachers of one position together, with ``weights`` in the order of their tables in ``data``.

    ``arithmetic`` is the mean of their probabilities, ``geometric`` of their log-probs; weights are
    divided by their sum.
    """

    kind: Literal["arithmetic", "geometric"]
    weights: tuple[Annotated[float, Field(gt=0.0, allow_inf_nan=False)], ...] = Field(min_length=2)


class KdConfig(Objective):
    """The divergence from the cached teacher with weight ``weight``, cross-entropy with the rest.

    Both distributions are taken at ``temperature``, cross-entropy at 1. With ``positions`` both are
    taken at those positions alone, and held-out rows are measured at all.
    """

    PACKS: ClassVar[bool] = True
    SEVERAL: ClassVar[bool] = True
    SHARDS: ClassVar[bool] = True

    loss: Literal["kd"] = "kd"
    weight: float = Field(default=1.0, gt=0.0, le=1.0)
    divergence: Divergence = ForwardKl()
    temperature: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    mixture: Mixture | None = None
    positions: Positions | None = None

    @model_validator(mode="after")
    def _plain_where_mixed(self) -> "KdConfig":
        if self.mixture is not None and not self.is_plain:
            raise ValueError(
                "mixture: it is of forward_kl at temperature 1: leave divergence and temperature "
                "out, or the mixture"
            )
        if self.mixture is not None and self.positions is not None:
            raise ValueError(
                "positions: they are selected of one teacher's rows: leave out mixture or positions"
            )
        return self

    @model_serializer(mode="wrap")
    def _given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what came later and is as it was, so that runs without it keep their names."""
        given: dict[str, Any] = dump(self)
        for name in ("divergence", "temperature", "mixture", "positions"):
            if getattr(self, name) == type(self).model_fields[name].default:
                del given[name]
        return given

    @property
    def is_plain(self) -> bool:
        """Whether it is the KL that every encoding has."""
        return isinstance(self.divergence, ForwardKl) and self.temperature == 1.0

    @property
    def reads(self) -> Reads:
        """The rows, the teacher's distributions and, where there is one, the table that selects."""
        return Reads(data=(TEACHER, *self.selects), rows=TEXT)

    @property
    def selects(self) -> tuple[str, ...]:
        """The table that says which positions; none where the teacher's own entropies do."""
        by = "" if self.positions is None else self.positions.by
        return (TABLES[by],) if by in TABLES else ()

    def require(self, data: Sequence[TableKind], lm_data: Sequence[TableKind]) -> None:
        """Refuse, beside other tables, teachers or an encoding that are not what is asked for."""
        places = data_sets_of([table for table, _ in data])
        self._require_one_teacher(data, len(places))
        most = 0
        for place in places:
            own = data[place]
            teachers = [kind for kind in own if kind[0] == TEACHER]
            others = [kind for kind in own if kind[0] != TEACHER]
            if not teachers and len(places) > 1:
                raise ConfigError(
                    f"data: there are {len(places)} tables of rows, and no {TEACHER} stand behind "
                    f"number {place.start + 1}, {own[0][0]}: name behind each the signals about "
                    f"its rows"
                )
            super().require([*others, *teachers[:1]], lm_data)
            self._require_mixed([variant for _, variant in teachers])
            most = max(most, len(teachers))
        if self.mixture is not None and most < 2:
            raise ConfigError(
                f"data: objective.mixture has {len(self.mixture.weights)} weights, and no rows "
                f"have more than one {TEACHER}: name the other teachers' tables, or leave it out"
            )

    def _require_one_teacher(self, data: Sequence[TableKind], num_data_sets: int) -> None:
        """Refuse several teachers or data sets where positions are selected."""
        num_teachers = sum(table == TEACHER for table, _ in data)
        if self.positions is not None and (num_teachers > 1 or num_data_sets > 1):
            raise ConfigError(
                f"data: objective.positions selects them in one data set with one teacher, there "
                f"are {num_data_sets} tables of rows and {num_teachers} {TEACHER}: name one of "
                f"each, or leave positions out"
            )

    def require_scorer(self, tables: Sequence[TableRef], student: Mapping[str, Any]) -> None:
        """Refuse entropies that another model than the student has: it selects by its own."""
        for table in tables if isinstance(self.positions, ByStudentEntropy) else ():
            is_other = table.made_by is not None and not is_one_model(table.made_by, student)
            if table.table.name == ENTROPIES and is_other:
                raise ConfigError(
                    f"data: objective.positions is by student_entropy, and '{table.step}' has "
                    f"the entropies of another model than the student: make them with the student"
                )

    def _require_mixed(self, encodings: Sequence[str]) -> None:
        """Refuse the teachers of one data set, by their encodings."""
        mixture = self.mixture
        if len(encodings) > 1 and mixture is None:
            raise ConfigError(
                f"data: {len(encodings)} of its tables are {TEACHER} about the same rows, expected "
                f"one of each kind: name one of them, or give 'objective.mixture: {{kind: "
                f"arithmetic, weights: [...]}}' to learn from all"
            )
        if len(encodings) > 1 and mixture is not None and len(encodings) != len(mixture.weights):
            raise ConfigError(
                f"data: {len(encodings)} of its tables are {TEACHER} about the same rows, "
                f"objective.mixture has {len(mixture.weights)} weights: give one for each, in "
                f"their order"
            )
        other = next((encoding for encoding in encodings if encoding not in WHOLE), None)
        if other is None:
            return
        if len(encodings) > 1 and mixture is not None and mixture.kind == "geometric":
            raise ConfigError(
                f"data: objective.mixture is geometric, which needs the log of every token's "
                f"probability, and one of the {TEACHER} is of encoding {other}, where a token that "
                f"is not kept has none: take 'encoding: {{kind: exact}}' for all, or arithmetic"
            )
        if not self.is_plain:
            asked: str = self.divergence.kind
            if self.temperature != 1.0:
                asked += f" at temperature {self.temperature:g}"
            raise ConfigError(
                f"data: objective 'kd' asks for {asked}, which needs whole distributions, and the "
                f"teacher_logits are of encoding {other}: that has forward_kl at temperature 1 "
                f"alone; take 'encoding: {{kind: exact}}', or leave divergence and temperature out"
            )

    def batches(self, data: "TrainingData") -> "Batches":
        """Return the rows with the teachers' distributions."""
        collate = data.taught()
        return data.rows(collate if self.positions is None else AtSelected(collate, self.positions))

    def terms(self, batch: dict[str, Any], step: "Step") -> "list[Term]":
        """Return the loss of one batch."""
        from stages.student.losses.kl import teacher_of  # these load torch
        from stages.student.losses.mixture import of_each, taught_by

        next_N = batch["next_token_ids_N"]
        if "taught" not in batch:
            loss = self._loss(next_N, teacher_of(batch, step.teacher_head))
            return [step.over_positions(batch, loss)]

        def own(columns: Mapping[str, Any], next_N: "Tensor") -> "PositionLoss":
            return self._loss(next_N, taught_by(columns, step.teacher_heads, self.mixture))

        return [step.over_positions(batch, of_each(batch, own))]

    def _loss(self, next_N: "Tensor", teacher: "Teacher") -> "PositionLoss":
        from stages.student.losses.divergences import MEASURES, KdByDivergence  # these load torch
        from stages.student.losses.kl import ExactTeacher, Kd

        if self.is_plain:
            return Kd(next_N, teacher, self.weight)
        assert isinstance(teacher, ExactTeacher), "another encoding is refused"
        measure, power = MEASURES[self.divergence.kind]
        measure = partial(measure, **self.divergence.model_dump(exclude={"kind"}))
        return KdByDivergence(next_N, teacher, self.weight, measure, self.temperature, power)
