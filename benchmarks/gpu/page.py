"""The page of ``run.py``: what each figure means, and the figures, where there are any."""

from collections.abc import Mapping
from typing import Any

from benchmarks.bars import bars_table, markdown_table

ABOUT = """# On a GPU

```
pip install -e '.[train]'           # and, to have them beside ours: pip install liger-kernel
python benchmarks/gpu/run.py --docs docs/measured/
```

One command of at most nine minutes on one NVIDIA GPU of 80 GB, with torch and transformers and no
vLLM; it writes this page. `--parts losses` runs one part, `--json FILE` keeps every number with
the card's name, its driver and all versions. On a machine without a GPU `--device cpu --quick`
tries the script out: small shapes, the same comparisons with float64, times that mean nothing.

{state}

## What each figure means

Every result is compared with float64 from its definition before it is timed: one that is further
off than bfloat16 explains is said to be wrong, and has no time. Times are medians between two
events of the GPU, with the lowest and the highest. "GB" is the most that tensors held during one
run: of a training step all of it, of a loss what comes beside hidden states, head and targets.

- **encoding**: `threshold`, k = 16, of [8,192, 151,936] logits, in bfloat16 and in float32, up to
  what is copied to the host. "reads" is its time over that of reading the logits once, which is
  their bytes over the bandwidth that was measured first: goal 3 or less. "reads, counted" is
  what its operations read and write, in the same unit; nothing was measured for it, and caches make
  the time less.
- **losses**: forward and backward of the student's head with its loss, hidden states [8,192, 2,048]
  and a head [151,936, 2,048] in bfloat16: `chunked_loss` beside torch, compiled torch and Liger's
  fused cross-entropy. Goals, of Liger's time: cross-entropy 1.0 or less, `kd` from a `threshold`
  table 1.1 or less. Our head's gradient is summed in float32, Liger's in the head's dtype, over
  many more and smaller chunks: so ours takes more memory, and "head gradient off" says what for.
- **sparse targets**: the KL to 16 weighted tokens a position, at 8,192 and 32,768 positions, beside
  VeOmni's chunked top-k distillation and Liger's KL to dense targets (which are made outside its
  time). One that does not install is named with the reason. `pip install --no-deps veomni` is
  enough where its other requirements are not wanted; it says itself what it then lacks.
- **training step**: forward, backward, clipping and AdamW of a 0.49 B student on 8 rows of 1,024
  tokens: cross-entropy alone, from a cached teacher, and with a live teacher of 4.0 B in bfloat16.
  "over" rows are the two ratios that matter: what a cached teacher adds to a step, and what a live
  one adds to that. Weights are random; speed does not depend on them.
"""

NOT_RUN = """**It was not run yet**: no GPU was at hand, so there is no figure here. What can be
counted without one (November 2026):

- The encoding will miss its goal: its operations pass over memory as often as 11 reads of float32
  logits, or 24 of bfloat16 ones, where 3 are asked. One pass that keeps the maximum, the sum and
  the sum of p log p of each piece of the vocabulary would leave the rest to a hundredth of it.
- Of the losses nothing speaks against their goals. Three products, 15 TFLOP in all, are the same
  for everybody; in chunks of 1 GiB `chunked_loss` reads and writes 100 GB with them for
  cross-entropy, and less than 0.1 GB more for `kd`. A quarter of that adds up the head's gradient,
  once a chunk, for which Liger 0.8.5 and its 64 chunks pass over 80 GB."""


def page(found: Mapping[str, Any] | None) -> str:
    """Return the page of a run, or before there was one."""
    if found is None:
        return ABOUT.format(state=NOT_RUN)
    card = ", ".join(f"{name} {value}" for name, value in found["card"].items())
    tables = []
    for part in dict.fromkeys(row["part"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["part"] == part]
        told = [{name: row[name] for name in row if name != "part"} for row in rows]
        tables.append(f"### {part.capitalize()}\n\n{markdown_table(told)}")
    tables.append(f"### Bars\n\n{bars_table(found['bars'])}")
    if found["notes"]:
        tables.append("### Not measured\n\n" + "\n".join(f"- {note}" for note in found["notes"]))
    state = f"The figures below are of one run ({card})."
    return ABOUT.format(state=state) + "\n## Figures\n\n" + "\n\n".join(tables) + "\n"
