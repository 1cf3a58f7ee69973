"""Write what ``storage.py`` measured as ``storage.md`` and ``storage.png``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.bars import Bar, bars_table, markdown_table

matplotlib.use("Agg")

Rows = Sequence[dict[str, Any]]

# family -> (label, colour, marker, line); the sequence is that of the legend
STYLES = {
    "tau (ours)": ("threshold, tau (ours, everything counted)", "#7b0d1e", "^", "-"),
    "threshold (ours)": ("threshold, k (ours, everything counted)", "#c1272d", "o", "-"),
    "RS-KD": ("RS-KD (payload alone)", "#0000a7", "s", "-"),
    "top-k + rest (ours)": ("top_k + rest bucket (ours, everything counted)", "#e8871e", "D", "-"),
    "top-k, bf16, renormalised": ("top-k bf16, renormalised (payload alone)", "#777777", "v", "-"),
    "polynomial top-k, rest zero": ("DistillKit-like, rest zero (payload)", "#008176", "P", "--"),
    "polynomial top-k, rest uniform": ("DistillKit-like, rest uniform", "#66b3a8", "X", "--"),
    "exact (ours)": ("exact (ours, everything counted)", "#7a3fa0", "*", ""),
}
PANELS = (
    ("loss_error_mean_abs", "error of the loss at a position (nats, mean abs)"),
    ("row_error_rms", "error of the loss of a 512-token row (nats, rms)"),
    ("batch_gradient_error", "error of the gradient of a batch of 8 rows (relative)"),
)
TEXT = """# Bytes a token against what they buy

Regenerate with `python benchmarks/storage/storage.py --docs docs/measured/` (the figures below come
from that run).

![error against bytes](storage.png)

Teacher: SmolLM2-135M-Instruct, float32, {tokens:,} tokens each of web pages, an encyclopaedia and
chat, in rows of 512. Student of the plot and the first table: ten of the teacher's layers after a
short distillation. What is measured: the loss a student would be trained on, `-sum_v q_v log s_v`
with q what the cache gives back, against the same with the teacher's full distribution; and its
gradient, by the final hidden states (position by position) and by the logits summed over a batch
of rows (as in a parameter's gradient: noise averages out, bias does not).

How bytes are counted. *Ours*: every file of the documents table and of the signals (input ids,
sample ids, offsets, schema, records, manifest) after zstd; what a table has once is shared out over
a shard of the default size. *Others*: the published payload alone, nothing else. RS-KD keeps 3
bytes for each distinct id; its 36 bytes a token are 12 distinct ids at 50 draws, which takes a
sharper teacher: on this text 50 draws give {distinct:.1f}. The DistillKit-like layout is our
reading of its README; its Parquet files (pyarrow's defaults) take {containers} bytes a token.

## Bars

{bars}

`threshold 16` keeps 16 entries of every position. `tau 0.04` (the default) keeps of each position
the fewest whose own threshold is at most 0.04: few where the teacher is sure, up to 25 where it is
not. Tail ids are stored by rising id, as gaps whose low and high bytes lie apart; the
[packed layout](packed.md) stores the same rows in fewer bytes. Against k = 16
noise moves from flat positions to sure ones: rms errors and gradients fall, while the mean absolute
error of a position's loss is a little higher.

## Ours against RS-KD, and tau against k = 16, as ratios

{ratios}

## Distilled student

{distilled}

## Close student

The teacher without two of its thirty layers, untrained: a student that is nearly there.

{close}

## KL(teacher || decoded)

Finite only where a scheme gives every token a probability. For `top_k + rest` the rest is spread
evenly over the other tokens here; a student is trained on it as one bucket. `threshold` and RS-KD
are estimates with zeros in them and have no finite KL: judge them by the tables above.

{divergences}

## By kind of text (distilled student)

{domains}
"""
COLUMNS = {
    "scheme": "scheme",
    "bytes": "bytes / token",
    "loss_error_mean_abs": "loss error, mean abs",
    "loss_error_rms": "rms",
    "loss_bias": "bias",
    "row_error_mean_abs": "row error, mean abs",
    "row_error_rms": "row rms",
    "hidden_gradient_error": "gradient by hidden states: rel. error",
    "hidden_gradient_cosine": "cosine",
    "batch_gradient_error": "summed over a batch: rel. error",
    "batch_gradient_cosine": "cosine of it",
}


def write_docs(folder: Path, rows: Rows, bars: Sequence[Bar], tokens: int) -> None:
    """Write both files; ``tokens`` is how many of each domain were measured."""
    folder.mkdir(parents=True, exist_ok=True)
    overall = [row for row in rows if row["domain"] == "all"]
    distilled = [row for row in overall if row["student"] == "distilled"]
    plot(folder / "storage.png", distilled)
    text = TEXT.format(
        tokens=tokens,
        distinct=next(r["entries"] for r in distilled if r["scheme"] == "RS-KD 50 draws"),
        containers=_containers(distilled),
        bars=bars_table(bars),
        ratios=markdown_table([_ratio(row) for row in rows if row["domain"] == "ratio"]),
        distilled=_table(distilled),
        close=_table([row for row in overall if row["student"] == "close"]),
        divergences=markdown_table([_divergence(row) for row in distilled if "kl_mean" in row]),
        domains=markdown_table(_by_domain(rows)),
    )
    (folder / "storage.md").write_text(text, encoding="utf-8")


def _containers(rows: Rows) -> str:
    return " and ".join(
        f"{row['container_bytes']:.0f} (payload {row['bytes']:.0f})"
        for row in rows
        if "container_bytes" in row and row["family"].endswith("zero")
    )


def _table(rows: Rows) -> str:
    ordered = sorted(rows, key=lambda row: (list(STYLES).index(row["family"]), row["bytes"]))
    return markdown_table([_named(row, COLUMNS) for row in ordered])


def _named(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    return {title: row.get(name) for name, title in columns.items()}


def _ratio(row: dict[str, Any]) -> dict[str, Any]:
    without = ("loss_bias", "hidden_gradient_cosine", "batch_gradient_cosine")
    columns = {name: title for name, title in COLUMNS.items() if name not in without}
    return {"student": row["student"], **_named(row, columns)}


def _divergence(row: dict[str, Any]) -> dict[str, Any]:
    names = {"scheme": "scheme", "bytes": "bytes / token", "kl_mean": "mean, nats"}
    return _named(row, names | {"kl_p50": "median", "kl_p99": "99th percentile"})


def _by_domain(rows: Rows) -> list[dict[str, Any]]:
    """Return a line for each sampling scheme: bytes and loss error of each domain."""
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        sampled = row.get("family") in ("tau (ours)", "threshold (ours)", "RS-KD")
        if sampled and row["student"] == "distilled" and row["domain"] != "all":
            line = lines.setdefault(row["scheme"], {"scheme": row["scheme"]})
            line[f"{row['domain']}: bytes"] = row["bytes"]
            line[f"{row['domain']}: loss error"] = row["loss_error_mean_abs"]
    return list(lines.values())


def plot(path: Path, rows: Rows) -> None:
    """Draw error against bytes for each family, one panel for each measure."""
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(16.5, 6.4), sharex=True)
    for axis, (name, title) in zip(axes, PANELS, strict=True):
        for family, (label, colour, marker, line) in STYLES.items():
            points = sorted((r["bytes"], r[name], r) for r in rows if r["family"] == family)
            axis.plot(
                [x for x, _, _ in points],
                [y for _, y, _ in points],
                label=label,
                color=colour,
                marker=marker,
                linestyle=line or "none",
                markersize=11 if marker == "*" else 6,
                linewidth=2.0 if "ours" in family else 1.4,
                zorder=3 if "ours" in family else 2,
            )
            if family in ("tau (ours)", "RS-KD"):
                _label_points(axis, points, colour, above=family == "RS-KD")
        _dress(axis, title)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=10)
    figure.suptitle(
        "What a byte buys: SmolLM2-135M, three kinds of text, error of a student's training signal "
        "against the full distribution",
        fontsize=12.5,
    )
    figure.tight_layout(rect=(0, 0.1, 1, 0.98))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _label_points(
    axis: Any, points: Sequence[tuple[Any, ...]], colour: str, *, above: bool
) -> None:
    """Name every point but those too near the one before on the axis of bytes."""
    last_x = 0.0
    for x, y, row in points:
        if x < last_x * 1.25:
            continue
        last_x = x
        words = row["scheme"].split()
        text = row["scheme"] if words[0] == "tau" else f"{words[1]} draws"
        axis.annotate(
            text,
            (x, y),
            xytext=(5, 5) if above else (-5, -5),
            textcoords="offset points",
            ha="left" if above else "right",
            va="bottom" if above else "top",
            fontsize=8,
            color=colour,
        )


def _dress(axis: Any, title: str) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    ticks = [16, 32, 64, 128, 256, 512, 1024]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlim(12, 1600)
    axis.set_xlabel("bytes a token")
    axis.set_title(title, fontsize=10.5)
    axis.grid(True, which="major", color="#dddddd", linewidth=0.8)
    axis.grid(True, which="minor", color="#f0f0f0", linewidth=0.5)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
