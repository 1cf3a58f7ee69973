"""What is compared: the in-context methods and their baselines, how much is made and trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.methods.in_context.world import Shape

START, MEND = "start", "mend"
RATES = (3e-3, 1e-2)  # tried first; then what lies beside the best in the grid
GRID = (1e-4, 3e-4, 1e-3, *RATES, 3e-2, 1e-1, 3e-1)
# A step of BiAlign over one of output alignment, in tokens that the student reads: an episode and
# four subsets of its demonstrations, of half of them on average. One with the LM term is as long.
LONGER = 3.0
LM_WEIGHT = 0.2
CLEAR, TIE_TOLERANCE = "clear_preferences", 0.1  # nats; of the others the stage's default
WRONG = 0.2  # of the answers of noisy training tasks, in demonstrations too


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is made and trained; tasks are counted a kind, examples and queries a task."""

    teacher: Shape
    teacher_first_steps: int
    teacher_steps: int
    teacher_whole_steps: int
    student: Shape
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
    teacher_examples: int = 16
    shown: int = 12
    support: int = 14
    num_vectors: int = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What a student is trained on: an objective, the tables about its episodes, and running text.

    ``rows`` is the step that draws its episodes, ``longer`` multiplies the steps.
    """

    said: str
    objective: Mapping[str, Any]
    signals: tuple[str, ...] = ()
    rows: str = "episodes"
    longer: float = 1.0

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


def _bialign(
    rank_weight: float, kl_reduction: str = "sum", preferences: str = "preferences"
) -> Method:
    averaged = ", KL averaged over positions" if kl_reduction == "mean" else ""
    clear = ", clear pairs alone" if preferences == CLEAR else ""
    return Method(
        said=f"BiAlign, lambda {rank_weight:g}{averaged}{clear}",
        objective={"loss": "bialign", "rank_weight": rank_weight, "kl_reduction": kl_reduction},
        signals=("logits", preferences),
    )


def _ict(
    where: str,
    prefix: str = "",
    rows: str = "episodes",
    *,
    lm_weight: float = 0.0,
    longer: float = 1.0,
) -> dict[str, Method]:
    """In-context tuning and ICL-D on the same rows."""
    return {
        f"{prefix}tuned": Method(
            said=where, objective=_icl(True, lm_weight), rows=rows, longer=longer
        ),
        f"{prefix}distilled": Method(
            said=f"ICL-D, {where}",
            objective=_icl(False, lm_weight),
            signals=("candidates",),
            rows=rows,
            longer=longer,
        ),
    }


METHODS: dict[str, Method] = {
    "fine_tuned": Method(said="fine-tuning, every token", objective={"loss": "cross_entropy"}),
    "output_align": Method(said="output alignment", objective={"loss": "kd"}, signals=("logits",)),
    "output_align_long": Method(
        said="output alignment, three times the steps",
        objective={"loss": "kd"},
        signals=("logits",),
        longer=LONGER,
    ),
    "bialign_mean": _bialign(1.0, "mean"),
    "bialign_mean_005": _bialign(0.05, "mean"),
    "bialign": _bialign(1.0),
    "bialign_005": _bialign(0.05),
    "bialign_clear": _bialign(1.0, preferences=CLEAR),
    **_ict("Meta-ICT"),
    **_ict("Meta-ICT with LM term", "lm_", lm_weight=LM_WEIGHT),
    **_ict("Meta-ICT, three times the steps", "long_", longer=LONGER),
    **_ict("Meta-ICT, a fifth of answers wrong", "noisy_", "noisy"),
    **_ict("Multitask-ICT", "multi_", "multi"),
    **_ict("Multitask-ICT with LM term", "multi_lm_", "multi", lm_weight=LM_WEIGHT),
}


def step_name(method: str, rate: float) -> str:
    """Return the name of a step of the search."""
    return f"{method}_at_{rate:g}".replace("-", "_").replace(".", "_")
