"""One training step, ready to be carried out by any process: it is picklable and needs no torch."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipeline.state.saved_checkpoints import SavedCheckpoints
from pipeline.state.working_folder import upload_checkpoint, working_folder
from schemas.storage.files import Folder
from schemas.storage.object_path import ObjectPath
from stages.models.checkpoints.checkpoint import local_copy
from stages.student.options import TrainOptions
from stages.student.train.stage import TrainConfig

OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """What to train, from where, to where; see ``stages.student.train.work.train``."""

    config: TrainConfig
    student: Folder
    data: tuple[Folder, ...]
    output: Folder
    fingerprint: str
    lm_data: tuple[Folder, ...] = ()
    reader: Folder | None = None
    adapter: Folder | None = None
    options: TrainOptions = field(default_factory=TrainOptions)

    def carry_out(self, on_event: OnEvent, *, leaves_group: bool = False) -> None:
        """Train, alone or as one process of a group that the environment describes.

        A process that has nothing else to do in its group ``leaves_group`` when it has trained.
        """
        from stages.student.train.process_group import leave_group  # loads torch
        from stages.student.train.work import train  # and transformers

        output, on_checkpoint = working_folder(self.output), None
        if isinstance(self.output, ObjectPath):
            saved = SavedCheckpoints(self.output, output)
            saved.fetch()
            on_checkpoint = saved.save
        train(
            self.config,
            student=local_copy(self.student),
            data=self.data,
            lm_data=self.lm_data,
            reader=None if self.reader is None else local_copy(self.reader),
            adapter=None if self.adapter is None else local_copy(self.adapter),
            output=output,
            fingerprint=self.fingerprint,
            options=self.options,
            on_event=on_event,
            on_checkpoint=on_checkpoint,
        )
        if leaves_group:
            leave_group()
        if isinstance(self.output, ObjectPath) and os.environ.get("RANK", "0") == "0":
            upload_checkpoint(output, self.output)
            saved.remove()
