"""Stage ``evaluate_preferences``: which students are compared on held-out pairs, and who judges."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from schemas.errors import ConfigError
from stages.stage import FolderStage, Kind, StageConfig, TableRef


class JudgeConfig(StageConfig):
    """Two models whose log-ratio judges responses: ``beta (log p_teacher - log p_reference)``."""

    teacher: str
    reference: str
    beta: float = Field(default=0.1, gt=0.0)

    @model_validator(mode="after")
    def _two_models(self) -> "JudgeConfig":
        if self.teacher == self.reference:
            raise ValueError(
                f"'teacher' and 'reference' are both '{self.teacher}', so every reward would be 0: "
                f"name the model that was aligned and the one it was aligned from"
            )
        return self


class PreferenceEvaluationStage(FolderStage):
    """Measure ``students`` on held-out preference pairs, beside ``baseline`` and under ``judge``.

    ``data`` is the pairs, then none or two tables of ``response_logprobs`` about them: those of the
    judge's teacher and of its reference, in this order. ``seed`` is that of the bootstrap and of
    which rows are shown.
    """

    KIND: ClassVar[Kind] = "report"
    VERSION: ClassVar[int] = 2
    NOT_HASHED: ClassVar[tuple[str, ...]] = ("data", "judge")  # the report names the others
    READS: ClassVar[tuple[str, ...]] = ("data",)
    RUNS: ClassVar[tuple[str, ...]] = ("students", "baseline", "judge.teacher", "judge.reference")

    stage: Literal["evaluate_preferences"]
    students: tuple[str, ...] = Field(min_length=1)
    baseline: str
    data: tuple[str, ...] = Field(min_length=1)
    judge: JudgeConfig | None = None
    max_tokens: int = Field(default=64, ge=1)
    batch_size: int = Field(default=8, ge=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _tables_of_the_judge(self) -> "PreferenceEvaluationStage":
        if problem := judge_tables_problem(len(self.data) - 1, has_judge=self.judge is not None):
            raise ValueError(problem)
        return self

    @property
    def measured(self) -> tuple[str, ...]:
        """The students, and the baseline where it is none of them."""
        return tuple(dict.fromkeys((*self.students, self.baseline)))

    def hashed(self) -> dict[str, Any]:
        """Return what names the step by content, with which of its models is what.

        Models are named by their place among all: those of the judge are not hashed.
        """
        names = dict.fromkeys(name for _, name in self.named(self.RUNS))
        place = {name: index for index, name in enumerate(names)}
        roles: dict[str, Any] = {
            "students": [place[name] for name in self.students],
            "baseline": place[self.baseline],
        }
        if self.judge:
            roles["judge"] = {
                "teacher": place[self.judge.teacher],
                "reference": place[self.judge.reference],
                "beta": self.judge.beta,
            }
        body = super().hashed()
        body["config"]["roles"] = roles
        return body

    def check(self, tables: Sequence[TableRef], models: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse a judge that is one model twice, and tables that are not its own.

        The two tables are told apart by their order, and held to the models that make them.
        """
        if self.judge is None:
            return
        judges = (self.judge.teacher, self.judge.reference)
        if models[judges[0]] == models[judges[1]]:
            raise ConfigError(
                f"judge: teacher '{judges[0]}' and reference '{judges[1]}' are one model, so "
                f"every reward would be 0: name the model that was aligned and the one before"
            )
        for table, name in zip(tables[1:], judges, strict=False):
            if table.made_by != models[name]:
                raise ConfigError(
                    f"data: '{table.step}' was not scored by '{name}': after the pairs come "
                    f"the scores of '{judges[0]}', then those of '{judges[1]}'"
                )


def judge_tables_problem(num_tables: int, *, has_judge: bool) -> str:
    """Return what is wrong with the number of tables beside the pairs, ``""`` if nothing is."""
    if num_tables not in (0, 2):
        return (
            f"'data' has {num_tables} tables beside the preference pairs, expected none or two "
            f"of response_logprobs: the judge's teacher's, then its reference's"
        )
    if num_tables and not has_judge:
        return "'data' has response_logprobs, which only a judge would read: name the judge"
    return ""
