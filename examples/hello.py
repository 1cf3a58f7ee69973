"""The Python interface in a few lines: open finished tables, look at a row, train a little.

After `make demo`, with the folders it names:
python examples/hello.py MODEL DOCUMENTS SIGNALS OUTPUT
"""

import sys
from pathlib import Path

from teachercache import open_dataset, weighted_tokens
from teachercache.student import KdConfig, TrainConfig, init_student, train

if len(sys.argv) != 5:
    sys.exit(
        "usage: python examples/hello.py MODEL DOCUMENTS SIGNALS OUTPUT (folders of a finished run)"
    )
model, documents, signals, output = map(Path, sys.argv[1:])

row = open_dataset([documents, signals], split="train")[0]
token_ids_PK, weights_PK = weighted_tokens(row)
print("token", row["first_target"], "is", row["input_ids_T"][row["first_target"]])
drawn = zip(token_ids_PK[0].tolist(), weights_PK[0].tolist(), strict=True)
print("the teacher's:", dict(drawn))

student = init_student(model, output / "student", layers=2)
config = TrainConfig(objective=KdConfig(), max_steps=4, per_device_batch_size=4)
trained = train(config, student=student.path, data=[documents, signals], output=output / "trained")
print(trained.metrics["before"])
print(trained.metrics["after"])
