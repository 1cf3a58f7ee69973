"""What is compared: the in-context methods and their baselines, how much is made and trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

START, MEND = "start", "mend"
RATES = (1e-3, 3e-3)
BEYOND = {1e-3: 3e-4, 3e-3: 1e-2}  # tried next where that one was best
# A step of BiAlign over one of output alignment, in tokens that the student reads: an episode and
# four subsets of its demonstrations, of half of them on average.
SUBSETS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is made and trained; examples are counted a task."""

    teacher_width: int
    teacher_layers: int
    teacher_steps: int
    teacher_whole_steps: int
    student_width: int
    student_layers: int
    start_steps: int
    start_whole_steps: int
    steps: int
    batch: int
    train_tasks: int
    train_examples: int
    judged_tasks: int
    novel_tasks: int
    judged_queries: int
    seeds: tuple[int, ...]
    distiller_steps: tuple[int, int]
    distiller_seeds: tuple[int, ...]
    teacher_examples: int = 16
    shown: int = 12
    support: int = 14
    num_vectors: int = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What a student is trained on: an objective, the tables about its episodes, and running text.

    ``longer`` multiplies the steps.
    """

    said: str
    objective: Mapping[str, Any]
    signals: tuple[str, ...] = ()
    multitask: bool = False
    longer: float = 1.0

    @property
    def rows(self) -> str:
        """The step that draws its episodes."""
        return "multi" if self.multitask else "episodes"

    @property
    def data(self) -> list[str]:
        """The steps of ``data``."""
        return [self.rows, *(f"{self.rows}_{signal}" for signal in self.signals)]

    @property
    def lm_data(self) -> list[str]:
        """The steps of ``lm_data``."""
        if not self.objective.get("lm_weight"):
            return []
        return ["text", "text_logits"] if self.signals else ["text"]


def _icl(hard: bool, lm_weight: float) -> dict[str, Any]:
    alpha_end = 1.0 if hard else 0.0
    return {"loss": "icl_distillation", "alpha_end": alpha_end, "lm_weight": lm_weight}


def _bialign(rank_weight: float, kl_reduction: str = "mean") -> Method:
    summed = ", KL summed over positions" if kl_reduction == "sum" else ""
    return Method(
        said=f"BiAlign, lambda {rank_weight:g}{summed}",
        objective={"loss": "bialign", "rank_weight": rank_weight, "kl_reduction": kl_reduction},
        signals=("logits", "preferences"),
    )


def _ict(*, multitask: bool) -> dict[str, Method]:
    """In-context tuning and ICL-D, each without and with the LM term."""
    prefix, where = ("multi_", "Multitask") if multitask else ("", "Meta")
    found = {}
    for name, hard in (("tuned", True), ("distilled", False)):
        for ending, weight in (("", 0.0), ("_lm", 0.2)):
            what = f"{where}-ICT" if hard else f"ICL-D, {where}-ICT"
            found[f"{prefix}{name}{ending}"] = Method(
                said=what + (" with LM term" if weight else ""),
                objective=_icl(hard, weight),
                signals=() if hard else ("candidates",),
                multitask=multitask,
            )
    return found


METHODS: dict[str, Method] = {
    "fine_tuned": Method(said="fine-tuning, every token", objective={"loss": "cross_entropy"}),
    "output_align": Method(said="output alignment", objective={"loss": "kd"}, signals=("logits",)),
    "output_align_long": Method(
        said="output alignment, three times the steps",
        objective={"loss": "kd"},
        signals=("logits",),
        longer=1.0 + SUBSETS / 2,
    ),
    "bialign": _bialign(1.0),
    "bialign_005": _bialign(0.05),
    "bialign_sum": _bialign(1.0, kl_reduction="sum"),
    **_ict(multitask=False),
    **_ict(multitask=True),
}


def step_name(method: str, rate: float) -> str:
    """Return the name of a step of the search."""
    return f"{method}_at_{rate:g}".replace("-", "_").replace(".", "_")
