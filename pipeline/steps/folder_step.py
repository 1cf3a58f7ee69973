"""Carry out a step that leaves a folder, a checkpoint or a report: all of it, then its name."""

from pipeline.planning.plan import PlannedStep
from pipeline.state.working_folder import published
from pipeline.steps.reporter import Reporter
from stages.stage import FolderStage, StepJob


def run_folder(step: PlannedStep, stage: FolderStage, reporter: Reporter) -> None:
    """Let the stage fill a folder of this machine, then publish it as the step's."""
    with published(step.place) as folder:
        job = StepJob(
            output=folder,
            fingerprint=step.fingerprint,
            identity=step.identity,
            tables=tuple(source.place for source in step.inputs),
            models={name: model.spec() for name, model in step.models.items()},
            said=reporter.said,
            trained=reporter.trained,
        )
        stage.make(job)
