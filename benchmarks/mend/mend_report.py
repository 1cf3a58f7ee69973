"""The page and the plot of the MEND benchmark."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bars import Bar, bars_table, markdown_table
from benchmarks.mend.query_pass import KEPT, MAKING, TEXT, VECTORS

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Shape:
    """What was run: mean tokens of a row's parts, a step's rows, the distiller, the load."""

    lengths: Mapping[str, float]
    batch_size: int
    layers: int
    vectors: int
    check: Mapping[str, int]
    load: float


PAGE = """# MEND: a step of training, and a query

Written by `python benchmarks/mend/mend.py --docs docs/measured/` (load {load:.1f} on {cpus} cores
at the start). Reader and teacher: SmolLM2-135M-Instruct, float32; distiller: {layers} of its
layers, {vectors} vectors. Rows of `financial_phrasebank`: demonstrations of {one:.0f} tokens each,
{shown:.0f} in all, before a query of {query:.0f} with its answer.

## Training

Steps of {batch} rows, both losses of stage 2. `live` runs the teacher, which is the reader and so
in memory anyhow, over the whole demonstrations without gradients, hidden states of the scored
positions alone; everything after that is what `cached_exact` does.

{training}

Where a step's time goes, one batch taken apart:

{shares}

- Seconds and ratios are of one run in which each batch is taken twice, live and then cached; the
  peak is the resident size of a process of its own, libraries included.
- First losses of `live` and `cached_exact` differ by the float16 of the cached states alone.
- The live teacher needs no weights of its own here, so the cache saves time and no memory: peaks of
  single runs differ by some percent either way. With `cross_model` the teacher is another model,
  whose weights a live run would hold as well.
- Threads that wait sleep here (`GOMP_SPINCOUNT=0`, which the command sets too). A step's many short
  products wait often: where other jobs share the cores, threads that spin instead made the reader's
  part of it nine times as long, in processor time, and a cached step 0.7x of a live one.

## Answering

One query after {vectors} vectors, after the demonstrations as text, and after text whose keys and
values are kept ("text, kept": prefix caching). Batch 1, a forward that ends in the logits of the
last position. Making the vectors is counted apart: it is done once a task. Operations, GFLOP:

{operations}

Seconds of wall time (medians), and ratios by wall and by processor time:

{times}

![operations and time of a query](mend.png)

- Operations by the formula in `benchmarks/mend/query_pass.py`; for the query alone it gives
  {formula:,} and torch's `FlopCounterMode` {torch:,}.
- Below {even:.1f} demonstrations of this length {vectors} vectors are longer than the text.
- An engine that keeps the text's keys and values pays for the demonstrations once, too, and can
  keep those of the vectors as well. What vectors then save is memory: {kept_text:.0f} MB of keys
  and values for {most} demonstrations, {kept_vectors:.0f} MB for the vectors (float32).

## Bars

{bars}
"""


def write_docs(
    folder: Path, shape: Shape, tables: tuple[Rows, Rows, Rows], bars: Sequence[Bar]
) -> None:
    """Write the page and its plot."""
    training, shares, answering = tables
    one, most = shape.lengths["one"], answering[-1]["demonstrations"]
    page = PAGE.format(
        load=shape.load,
        cpus=os.cpu_count(),
        layers=shape.layers,
        vectors=shape.vectors,
        one=one,
        shown=shape.lengths["demonstrations"],
        query=shape.lengths["query"],
        batch=shape.batch_size,
        training=markdown_table(training),
        shares=markdown_table(shares),
        operations=markdown_table([_columns(row, "GFLOP", "FLOP, ") for row in answering]),
        times=markdown_table([_columns(row, "s", "wall, ", "CPU, ") for row in answering]),
        formula=shape.check["by_formula"],
        torch=shape.check["by_torch"],
        even=shape.vectors / one,
        most=most,
        kept_text=most * one * KEPT_BYTES / 1e6,
        kept_vectors=shape.vectors * KEPT_BYTES / 1e6,
        bars=bars_table(bars),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mend.md").write_text(page)
    plot(folder / "mend.png", answering, shape.vectors)


def _columns(row: Mapping[str, Any], unit: str, *ratios: str) -> dict[str, Any]:
    """Return a row's numbers of one unit, and its ratios of it."""
    found = {"demonstrations": row["demonstrations"]}
    for name, value in row.items():
        if name.endswith(f", {unit}"):
            found[name.removesuffix(f", {unit}")] = value
        elif name.startswith(ratios):
            found[name] = value
    return found


KEPT_BYTES = 30 * 2 * 3 * 64 * 4  # keys and values of a token: layers, both, heads, width, float32
LINES = {
    TEXT: ("demonstrations as text", "#555753", "-", "s"),
    KEPT: ("the same, keys and values kept", "#888a85", "--", "s"),
    VECTORS: ("after {} vectors", "#3465a4", "-", "o"),
    MAKING: ("making the vectors, once a task", "#3465a4", ":", "o"),
}


def plot(path: Path, answering: Rows, vectors: int) -> None:
    """Draw operations and time of a query by the number of demonstrations."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8))
    panels = (("GFLOP", "operations of a query, GFLOP"), ("s", "time of a query, s (median)"))
    counts = [row["demonstrations"] for row in answering]
    for axis, (unit, title) in zip(axes, panels, strict=True):
        for name, (label, colour, style, marker) in LINES.items():
            rows = [row for row in answering if f"{name}, {unit}" in row]
            axis.plot(
                [counts.index(row["demonstrations"]) for row in rows],
                [row[f"{name}, {unit}"] for row in rows],
                color=colour, linestyle=style, marker=marker, markersize=4,
                label=label.format(vectors),
            )  # fmt: skip
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("demonstrations")
        axis.set_xticks(range(len(counts)), [str(count) for count in counts])
        axis.set_yscale("log")
        axis.grid(axis="y", color="#eeeeec")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
