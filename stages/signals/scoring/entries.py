"""How many entries a position keeps of a sampled distribution: settings that two stages share."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from stages.stage import StageConfig

MOST = 255  # counts are stored in 8 bits


class Entries(StageConfig):
    """``tau``: as many as bring a position's own threshold to tau, at most ``max_k``; or ``k``.

    tau is one constant of the table, so entries go where the variance is; ``k`` keeps as many of
    every position. Without either, ``tau`` is ``TAU``.
    """

    TAU: ClassVar[float]
    MAX_K: ClassVar[int]

    kind: Literal["threshold"] = "threshold"
    tau: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    max_k: int | None = Field(default=None, ge=1, le=MOST)
    k: int | None = Field(default=None, ge=2)

    @model_validator(mode="before")
    @classmethod
    def _tau_unless_k(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("k") is None:
            return {"tau": cls.TAU, "max_k": cls.MAX_K, **given}
        return given

    @model_validator(mode="after")
    def _one_rule(self) -> "Entries":
        if self.k is not None and (self.tau is not None or self.max_k is not None):
            raise ValueError(
                f"k is {self.k} beside tau or max_k: k keeps so many entries of every position, "
                f"tau lets their number follow the position; give one of them"
            )
        if self.k is None and (self.tau is None or self.max_k is None):
            raise ValueError("tau and max_k are numbers: leave them out for their defaults")
        return self

    @model_serializer(mode="wrap")
    def _given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the rule that is not used: tables of k entries keep their fingerprints."""
        return {name: value for name, value in dump(self).items() if value is not None}
