"""Carry out a training step: in this process, in several of this machine, or on Ray."""

from pipeline.executors.training_job import TrainingJob
from pipeline.planning.fingerprint import ADDRESS_DIGITS
from pipeline.planning.plan import Model, PlannedStep
from pipeline.planning.recipe import Execution
from pipeline.state.working_folder import remove_work
from pipeline.steps.reporter import Reporter
from schemas.storage.files import Folder
from stages.student.options import TrainOptions
from stages.student.train.stage import TrainStage


def run_training(
    step: PlannedStep, stage: TrainStage, execution: Execution, reporter: Reporter
) -> None:
    """Train in this process, in several of this machine, or on the workers of a Ray cluster."""
    student = step.models[stage.student]
    goes_on = stage.adapts is not None  # planning has seen that an adapter is of the same kind
    reader = None if stage.reader is None else step.models[stage.reader]
    job = TrainingJob(
        config=stage,
        student=student.base if goes_on else _place(student),
        adapter=student.adapter if goes_on else None,
        data=tuple(source.place for source in step.inputs[: len(stage.data)]),
        lm_data=tuple(source.place for source in step.inputs[len(stage.data) :]),
        reader=None if reader is None else _place(reader),
        output=step.place,
        fingerprint=step.fingerprint,
        options=TrainOptions(
            report_to=execution.report_to,
            sharding=execution.training_sharding,
            run_name=f"{step.name}-{step.fingerprint[:ADDRESS_DIGITS]}",
        ),
    )
    if execution.executor == "ray":
        from pipeline.executors.ray_cluster.training import train_on_ray  # loads ray

        address = execution.address
        train_on_ray(job, execution.training_processes, reporter.trained, address=address)
    elif execution.training_processes == 1:
        job.carry_out(reporter.trained)
    else:
        from pipeline.executors.local.training import train_in_processes  # loads torch

        train_in_processes(job, execution.training_processes, reporter.trained)
    remove_work(step.place)


def _place(model: Model) -> Folder:
    """Return a model's folder: an adapter is merged now, what lies in a store is fetched there."""
    return model.base if model.adapter is None else model.folder
