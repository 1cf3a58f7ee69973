"""Every stage that a recipe can name, a line each.

``python -m stages.registry`` (``make stages``) writes what Airflow's files know of them.
"""

from pathlib import Path
from typing import Annotated, get_args

from pydantic import Field

from stages.signals.advantages.stage import AdvantagesStage
from stages.signals.aligned_spans.stage import AlignedSpansStage
from stages.signals.candidate_scores.stage import CandidateScoresStage
from stages.signals.response_logprobs.stage import ResponseLogprobsStage
from stages.signals.responses.stage import ResponsesStage
from stages.signals.subset_preferences.stage import SubsetPreferencesStage
from stages.signals.teacher_logits.stage import TeacherLogitsStage
from stages.signals.token_entropies.stage import TokenEntropiesStage
from stages.sources.answers.stage import AnswersStage
from stages.sources.conversations.stage import ConversationsStage
from stages.sources.demonstrations.stage import DemonstrationsStage
from stages.sources.documents.stage import IngestStage
from stages.sources.episodes.stage import EpisodesStage
from stages.sources.finished_table.stage import FinishedTableStage
from stages.sources.preference_pairs.stage import PreferencePairsStage
from stages.sources.span_masks.stage import SpanMasksStage
from stages.sources.token_files.stage import TokenFilesStage
from stages.stage import Stage
from stages.student.distiller.stage import DistillerInitStage
from stages.student.evaluate.stage import EvaluateStage
from stages.student.evaluate_preferences.stage import PreferenceEvaluationStage
from stages.student.init.stage import StudentInitStage
from stages.student.train.stage import TrainStage
from stages.teacher.stage import TeacherAlignStage

Step = Annotated[
    IngestStage
    | TokenFilesStage
    | EpisodesStage
    | DemonstrationsStage
    | ConversationsStage
    | AnswersStage
    | SpanMasksStage
    | PreferencePairsStage
    | FinishedTableStage
    | TeacherLogitsStage
    | TokenEntropiesStage
    | AlignedSpansStage
    | SubsetPreferencesStage
    | CandidateScoresStage
    | ResponsesStage
    | ResponseLogprobsStage
    | AdvantagesStage
    | TeacherAlignStage
    | StudentInitStage
    | DistillerInitStage
    | TrainStage
    | EvaluateStage
    | PreferenceEvaluationStage,
    Field(discriminator="stage"),
]
STAGES: tuple[type[Stage], ...] = get_args(get_args(Step)[0])

AIRFLOW = Path("airflow_dags") / "teachercache_stages.py"
_HEADER = (
    '"""What each stage does, and which settings name steps and models; '
    'written by ``make stages``."""'
)


def airflow_list() -> str:
    """Return the file that Airflow's environment reads in the place of this package."""
    kinds = [f'    "{name_of(stage)}": "{stage.KIND}",' for stage in STAGES]
    named = [
        setting for stage in STAGES for setting in (*stage.READS, *stage.RUNS, *stage.ALSO_RUNS)
    ]
    references = [f'    "{key}",' for key in dict.fromkeys(name.split(".")[0] for name in named)]
    lists = ["KINDS = {", *kinds, "}", "REFERENCES = (", *references, ")"]
    return "\n".join([_HEADER, "", *lists, ""])


def name_of(stage: type[Stage]) -> str:
    """Return what a recipe calls a stage."""
    return str(get_args(stage.model_fields["stage"].annotation)[0])


def main() -> None:
    """Write Airflow's list; the current folder is the repository's root."""
    AIRFLOW.write_bytes(airflow_list().encode())


if __name__ == "__main__":
    main()
