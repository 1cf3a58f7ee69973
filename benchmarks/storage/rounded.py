"""``exact`` in steps: bytes beside float16's, and the KL from the teacher, on real positions.

Rows of three kinds of text go through the product's own stage and writer, once as float16 and once
for each ``mean_kl``; what is compared is what is read back. "KL" is over all positions, not those
that the stage measures itself: the teacher's states in float32, through its head, against the
states that are stored. Bytes are those of every file of the table but the head, which both have
(shares of a shard as in ``storage_schemes``).

Beside them other ways to round, on the web rows, as bytes of their columns after zstd at the
table's level.

Dimensions: P = positions, D = hidden width, V = vocabulary.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from benchmarks.bars import (
    Bar,
    at_most,
    bars_table,
    benchmark_parser,
    finish,
    machine,
    markdown_table,
)
from benchmarks.storage.packed import documents_of
from benchmarks.storage.real_positions import (
    MODEL,
    ROW_TOKENS,
    SOURCES,
    Seen,
    load_domain,
    missing_asset,
    see,
)
from benchmarks.storage.storage_schemes import CachedEngine, write_table
from schemas.rounded_states import in_steps
from schemas.storage.records import shard_name
from schemas.storage.shards import ROWS_PER_BATCH, read_shard
from schemas.table import CAPTURE_ZSTD_LEVEL
from schemas.tables.documents import DOCUMENTS
from stages.models.causal_lm.language_head import LanguageHead
from stages.signals.teacher_logits.stage import TeacherLogitsStage
from stages.signals.teacher_logits.work import score_shard

Array = npt.NDArray[Any]
MAX_RATIO, MAX_KL = 0.55, 1e-4
ROWS, QUICK_ROWS = 8, 2
OTHERS = 1022  # positions on which other ways to round are tried
ALLOWED = (None, 1e-4, 1e-3)
CHUNK = 128

PAGE = """# `exact` in steps

Written by `python benchmarks/storage/rounded.py --docs docs/measured/` ({machine}). SmolLM2-135M in
float32 (D = 576), {tokens:,} tokens of each kind of text.

{bars}

{tables}

- "bytes / token" are of every file of the `teacher_logits` table but the head (113 MB once, the
  same for both); "over float16" is beside `exact` as it is stored without `mean_kl`, zstd included.
- "KL" is the mean of KL(p, p') over all positions, p of the teacher's float32 states and p' of the
  stored ones; "said" is what the table's rows say of themselves, measured on up to 32 positions
  of each.
- float16 is not exact either: its row says what that costs.
- A teacher in bfloat16 has states of 8 significant bits, which zstd brings to fewer bytes as
  float16; beside those `mean_kl` saves less.

## Other ways to round

{others_of:,} positions of the web rows, columns of states alone.

{others}

Outlying components of a state ({outliers:.0f} times the root mean square in the mean) leave few of
a byte's 256 levels to the others where codes are scaled to fill it. A scale a component, fitted on
these very rows, mends most of that, and would have to be found before the table is begun. In
steps, outliers cost a few bits each and nobody else anything.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--docs", type=Path, help="write rounded.md there")
    options = parser.parse_args(arguments)
    if missing := missing_asset(options.cache):
        print(missing)
        return 2
    names = tuple(SOURCES)[:1] if options.quick else tuple(SOURCES)
    num_rows = QUICK_ROWS if options.quick else ROWS
    rows: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    outliers = 0.0
    for name in names:
        rows_RT = load_domain(options.cache, name, num_rows).measured_RT
        print(f"{name}: running the teacher over {rows_RT.numel()} tokens", flush=True)
        seen = see(options.cache / MODEL, rows_RT, options.cache)
        with tempfile.TemporaryDirectory(prefix="rounded-") as scratch:
            rows += [*tables_of(name, rows_RT.numpy(), seen, Path(scratch))]
        if not others:
            hidden_PD = states_of(seen)[:OTHERS]
            size_P = np.sqrt(np.square(hidden_PD).mean(axis=1))
            outliers = float((np.abs(hidden_PD).max(axis=1) / size_P).mean())
            others = [*other_ways(hidden_PD, seen.head)]
    bars = [*judge(rows)]
    if options.docs:
        page = PAGE.format(
            machine=machine(),
            tokens=num_rows * ROW_TOKENS,
            bars=bars_table(bars),
            tables=markdown_table(rows),
            others=markdown_table(others),
            others_of=OTHERS,
            outliers=outliers,
        )
        (options.docs / "rounded.md").write_text(page, encoding="utf-8")
    return finish(bars, [*rows, *others], options.json)


def states_of(seen: Seen) -> Array:
    """Return the teacher's states at all scored positions [P, D], end to end."""
    return seen.hidden_RTD[:, :-1].flatten(0, 1).float().numpy()


def tables_of(name: str, rows_RT: Array, seen: Seen, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a row of the report for each table: float16, then each ``mean_kl``."""
    vocab_size, width = seen.head.weight_VD.shape
    batch = DOCUMENTS.bind(vocab_size=vocab_size).to_batch(documents_of(rows_RT))
    shard = pa.Table.from_batches([batch])
    plain = 0.0
    for mean_kl in ALLOWED:
        encoding = {"kind": "exact", "mean_kl": mean_kl}
        fields = {"stage": "teacher_logits", "input": "-", "model": "-", "encoding": encoding}
        stage = TeacherLogitsStage.model_validate(fields)
        place = folder / f"{mean_kl}"
        bound = stage.table.bind(vocab_size=vocab_size, sizes={"D": width})
        size = write_table(place, bound, score_shard(stage, CachedEngine(seen), shard))
        plain = plain or size
        table = read_shard(place / f"{shard_name(0, 1)}.arrow")
        kept = [row for each in table.to_batches() for row in stage.table.rows(each)]
        stored_PD = np.concatenate([np.asarray(row.hidden_PD, np.float32) for row in kept])
        kl_P = kl_of(seen.head, states_of(seen), stored_PD)
        row = {
            "text": name,
            "mean_kl": "float16" if mean_kl is None else f"{mean_kl:g}",
            "bytes / token": size,
            "over float16": size / plain,
            "KL": f"{kl_P.mean():.2e}",
            "KL, 99 % below": f"{np.quantile(kl_P, 0.99):.1e}",
        }
        if mean_kl is not None:
            said = np.mean([row.rounding_kl for row in kept])
            components = kept[0].hidden_codes_PD.size * len(kept)
            beyond = sum(len(row.hidden_beyond_E) for row in kept)
            row |= {"said": f"{said:.2e}", "beyond a byte": f"{beyond / components:.2%}"}
        yield row


def kl_of(head: LanguageHead, hidden_PD: Array, other_PD: Array) -> npt.NDArray[np.float64]:
    """Return KL(p, p') [P] of two arrays of states."""
    found = []
    for start in range(0, len(hidden_PD), CHUNK):
        told, again = (
            head.logits(torch.from_numpy(states_PD[start : start + CHUNK])).log_softmax(dim=1)
            for states_PD in (hidden_PD, other_PD)
        )
        found.append((told.exp() * (told - again)).sum(dim=1).double().numpy())
    return np.concatenate(found)


def other_ways(hidden_PD: Array, head: LanguageHead) -> Iterator[dict[str, Any]]:
    """Yield bytes a position and KL of other ways to round; each is a matrix of codes and a step.

    Steps that are searched are the longest of a KL of at most 1e-4.
    """
    size = float(np.sqrt(np.square(hidden_PD).mean()))
    fitted_D = hidden_PD.std(axis=0)
    largest_P1 = np.abs(hidden_PD).max(axis=1, keepdims=True)
    scaled_PD = hidden_PD / fitted_D
    plain = squeezed([hidden_PD.astype(np.float16)])

    def told(way: str, columns: list[Array], again_PD: Array) -> dict[str, Any]:
        kl_P = kl_of(head, hidden_PD, again_PD.astype(np.float32))
        num_bytes = squeezed(columns)
        return {
            "way": way,
            "bytes / position": num_bytes,
            "over float16": num_bytes / plain,
            "KL": f"{kl_P.mean():.2e}",
        }

    yield told("float16", [hidden_PD.astype(np.float16)], hidden_PD.astype(np.float16))
    step_P1 = largest_P1 / 127
    codes_PD = np.rint(hidden_PD / step_P1).astype(np.int8)
    yield told("8 bits, a scale a position", [codes_PD, step_P1], codes_PD * step_P1)
    step_P1 = np.abs(scaled_PD).max(axis=1, keepdims=True) / 127
    codes_PD = np.rint(scaled_PD / step_P1).astype(np.int8)
    again_PD = codes_PD * step_P1 * fitted_D
    yield told("8 bits, a scale a position and one a component", [codes_PD, step_P1], again_PD)
    step = searched(lambda at: np.rint(hidden_PD / at) * at, size / 80, hidden_PD, head)
    codes_PD, beyond_E = in_steps(hidden_PD, step)
    again_PD = np.rint(hidden_PD / step) * step
    yield told("whole steps, one for all rows", [codes_PD, beyond_E], again_PD)
    low_PD = (np.rint(hidden_PD / step).astype(np.int16) & 255).astype(np.uint8)
    high_PD = (np.rint(hidden_PD / step).astype(np.int16) >> 8).astype(np.int8)
    yield told("the same, low and high bytes apart", [low_PD, high_PD], again_PD)
    kl_P = kl_of(head, hidden_PD, again_PD.astype(np.float32))
    step_P1 = step * np.clip(np.sqrt(MAX_KL / np.maximum(kl_P, 1e-12)), 0.3, 4.0)[:, None]
    whole_PD = np.rint(hidden_PD / step_P1).astype(np.int32)
    is_beyond_PD = np.abs(whole_PD) > 127
    codes_PD = np.where(is_beyond_PD, -128, whole_PD).astype(np.int8)
    columns = [codes_PD, whole_PD[is_beyond_PD], step_P1.astype(np.float32)]
    yield told("whole steps, one a position", columns, whole_PD * step_P1)


def searched(
    rounded: Callable[[float], Array], step: float, hidden_PD: Array, head: LanguageHead
) -> float:
    """Return a step with a KL of 0.95e-4 to 1e-4, by the law of squares."""
    for _ in range(6):
        kl = float(kl_of(head, hidden_PD, rounded(step).astype(np.float32)).mean())
        if 0.95 * MAX_KL <= kl <= MAX_KL:
            break
        step *= (0.975 * MAX_KL / kl) ** 0.5
    return step


def squeezed(columns: Sequence[Array]) -> float:
    """Return bytes a position after zstd, each column in pieces of a record batch's positions."""
    codec = pa.Codec("zstd", compression_level=CAPTURE_ZSTD_LEVEL)
    positions, total = len(columns[0]), 0
    pieces = max(1, positions // (ROWS_PER_BATCH * (ROW_TOKENS - 1)))
    for column in columns:
        for piece in np.array_split(column, pieces):
            total += len(codec.compress(np.ascontiguousarray(piece).tobytes()))
    return total / positions


def judge(rows: Sequence[dict[str, Any]]) -> Iterator[Bar]:
    """Yield the bars: the worst of the texts."""
    asked = [row for row in rows if row["mean_kl"] == f"{MAX_KL:g}"]
    ratio = max(float(row["over float16"]) for row in asked)
    yield at_most("mean_kl 1e-4: bytes over float16's, the worst text", round(ratio, 4), MAX_RATIO)
    kl = max(float(row["KL"]) for row in asked)
    yield at_most("mean_kl 1e-4: mean KL in nats over all positions, the worst text", kl, MAX_KL)


if __name__ == "__main__":
    sys.exit(main())
