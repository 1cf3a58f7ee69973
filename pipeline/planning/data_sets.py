"""Which steps' tables a training step reads together: those about the rows of one data set."""

from pipeline.planning.plan import PlannedStep
from stages.sources.finished_table.stage import FinishedTableStage
from stages.stage import SourceStage, TableStage
from stages.student.batches.several_datasets import data_sets_of
from stages.student.train.stage import TrainStage


def data_sets(step: PlannedStep) -> list[tuple[PlannedStep, ...]]:
    """Return the steps whose tables a training step reads as ``data``, data set by data set."""
    assert isinstance(step.stage, TrainStage)
    inputs = step.inputs[: len(step.stage.data)]
    tables = []
    for source in inputs:
        assert isinstance(source.stage, SourceStage | TableStage | FinishedTableStage)
        tables.append(source.stage.table.name)
    return [inputs[place] for place in data_sets_of(tables)]
