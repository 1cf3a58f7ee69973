"""Every stage that a recipe can name, a line each."""

from typing import Annotated, get_args

from pydantic import Field

from stages.signals.advantages.stage import AdvantagesStage
from stages.signals.candidate_scores.stage import CandidateScoresStage
from stages.signals.response_logprobs.stage import ResponseLogprobsStage
from stages.signals.student_responses.stage import StudentResponsesStage
from stages.signals.subset_preferences.stage import SubsetPreferencesStage
from stages.signals.teacher_logits.stage import TeacherLogitsStage
from stages.sources.documents.stage import IngestStage
from stages.sources.episodes.stage import EpisodesStage
from stages.sources.preference_pairs.stage import PreferencePairsStage
from stages.stage import Stage
from stages.student.evaluate.stage import EvaluateStage
from stages.student.evaluate_preferences.stage import PreferenceEvaluationStage
from stages.student.init.stage import StudentInitStage
from stages.student.train.stage import TrainStage
from stages.teacher.stage import TeacherAlignStage

Step = Annotated[
    IngestStage
    | EpisodesStage
    | PreferencePairsStage
    | TeacherLogitsStage
    | SubsetPreferencesStage
    | CandidateScoresStage
    | StudentResponsesStage
    | ResponseLogprobsStage
    | AdvantagesStage
    | TeacherAlignStage
    | StudentInitStage
    | TrainStage
    | EvaluateStage
    | PreferenceEvaluationStage,
    Field(discriminator="stage"),
]
STAGES: tuple[type[Stage], ...] = get_args(get_args(Step)[0])
