"""For trainers of your own: transformers' ``Trainer`` or TRL's ``SFTTrainer`` on finished tables.

    trainer = Trainer(model, args, **distillation([inputs, signals], tokenizer, weight=0.9))

The train extra has what this needs; SFTTrainer needs the package ``datasets`` too.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.student.hf_trainer import TrainerArguments, distillation
else:
    from teachercache.own.stages.student.hf_trainer import TrainerArguments, distillation

__all__ = ["TrainerArguments", "distillation"]
