"""Bytes a token on disk against what they buy: the error of a student's loss and gradient.

Real SmolLM2-135M positions of three kinds of text; see ``signal_error`` for what is measured,
``storage_schemes`` for what is compared and how bytes are counted, ``real_positions`` for the two
students. ``--docs FOLDER`` also writes ``storage.md`` and ``storage.png`` there.

Bars: ``threshold`` with k = 16 takes at most 36 bytes a token with everything counted; at no more
bytes than the payload of RS-KD at its published 50 draws, the error of ours is at most half of
RS-KD's. With tau in the place of k, by both measures of the gradient and both students: at no
higher error than k = 16 at most 27 bytes a token, and at no more bytes at most 0.8 of its error.
"""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bars import Bar, at_most, benchmark_parser, finish
from benchmarks.storage.real_positions import (
    MODEL,
    ROW_TOKENS,
    SOURCES,
    Domain,
    Seen,
    close_student,
    distilled_student,
    load_domains,
    missing_asset,
    see,
)
from benchmarks.storage.storage_report import write_docs
from benchmarks.storage.storage_results import STUDENTS, as_row, measure_domain, overall
from benchmarks.storage.storage_schemes import (
    Scheme,
    draws_for,
    peer_schemes,
    stored_schemes,
)

MAX_BYTES, MAX_ERROR_RATIO = 36.0, 0.5
MAX_TAU_BYTES, MAX_TAU_ERROR_RATIO = 27.0, 0.8
GRADIENTS = ("hidden_gradient_error", "batch_gradient_error")
PUBLISHED_DRAWS = 50
ERROR = "loss_error_mean_abs"
TAU = "tau (ours)"
OURS = ("threshold (ours)", TAU)


@dataclass(frozen=True)
class Size:
    """How much is measured: errors on the first ``measured`` of the rows that are written."""

    domains: tuple[str, ...]
    rows_per_domain: int
    measured: int
    encodings: tuple[Mapping[str, Any], ...]
    top_k: tuple[int, ...]
    draws: tuple[int, ...]
    training_steps: int


FULL = Size(
    domains=tuple(SOURCES),
    rows_per_domain=16,
    measured=16,
    encodings=(
        *({"kind": "threshold", "k": k} for k in (8, 16, 20, 32, 64)),
        *({"kind": "threshold", "tau": tau} for tau in (0.1, 0.05, 0.04, 0.03, 0.025, 0.015)),
        *({"kind": "top_k", "k": k} for k in (12, 50, 128)),
        {"kind": "exact"},
    ),
    top_k=(12, 50, 128),
    draws=(25, PUBLISHED_DRAWS, 100),
    training_steps=30,
)
# One domain; whole record batches of 16 rows, so bytes are real; errors of few positions.
QUICK = Size(
    domains=("web",),
    rows_per_domain=16,
    measured=2,
    encodings=(
        *({"kind": "threshold", "k": k} for k in (16, 24)),
        *({"kind": "threshold", "tau": tau} for tau in (0.05, 0.03)),
    ),
    top_k=(12,),
    draws=(PUBLISHED_DRAWS,),
    training_steps=10,
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--docs", type=Path, help="write storage.md and storage.png there")
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else FULL
    if missing := missing_asset(options.cache):
        print(missing)
        return 2
    rows = measure(options.cache, size)
    ratios, bars = judge(rows)
    if options.docs:
        write_docs(options.docs, [*rows, *ratios], bars, size.measured * ROW_TOKENS)
    shown = [_brief(row) for row in [*rows, *ratios] if row["domain"] in ("all", "ratio")]
    return finish(bars, [*rows, *ratios], options.json, shown=shown)


def measure(cache: Path, size: Size) -> list[dict[str, Any]]:
    """Return a row for each domain (and all of them), student and scheme."""
    every = load_domains(cache, size.rows_per_domain)
    models = {
        "teacher": cache / MODEL,
        "distilled": distilled_student(cache, every, size.training_steps),
        "close": close_student(cache),
    }
    domains = [domain for domain in every if domain.name in size.domains]
    seen: dict[str, list[Seen]] = {}
    for name, folder in models.items():
        count = size.rows_per_domain if name == "teacher" else size.measured
        rows_RT = torch.cat([domain.measured_RT[:count] for domain in domains])
        print(f"running {name} over {rows_RT.numel()} tokens", flush=True)
        whole = see(folder, rows_RT, cache)
        seen[name] = [Seen(part, whole.head) for part in torch.split(whole.hidden_RTD, count)]
    with tempfile.TemporaryDirectory(prefix="storage-") as scratch:
        return _measure(domains, seen, size, Path(scratch))


def _measure(
    domains: Sequence[Domain], seen: dict[str, list[Seen]], size: Size, folder: Path
) -> list[dict[str, Any]]:
    schemes: dict[str, list[Scheme]] = {}
    for domain, teacher in zip(domains, seen["teacher"], strict=True):
        print(f"writing {domain.name}", flush=True)
        schemes[domain.name] = stored_schemes(domain, teacher, folder / domain.name, size.encodings)
    draws = sorted({*size.draws, _equal_draws(seen["teacher"], schemes)})
    results = []
    for index, domain in enumerate(domains):
        print(f"measuring {domain.name}", flush=True)
        parts = {name: of_domains[index] for name, of_domains in seen.items()}
        teacher = Seen(parts["teacher"].hidden_RTD[: size.measured], parts["teacher"].head)
        in_domain = schemes[domain.name]
        in_domain += peer_schemes(teacher, folder, draws=draws, top_k=size.top_k)
        for scheme in in_domain:
            scheme.rows = scheme.rows[: size.measured]
        results += measure_domain(domain.name, in_domain, {**parts, "teacher": teacher})
    return [*overall(results), *map(as_row, results)]


def _equal_draws(teachers: Sequence[Seen], schemes: dict[str, list[Scheme]]) -> int:
    """Return the RS-KD draws whose payload is that of threshold 16 on disk."""
    sizes = [s.bytes for in_domain in schemes.values() for s in in_domain if _is_ours(s)]
    sampled = [teacher.hidden_RTD[:, 5 : ROW_TOKENS - 1 : 37].flatten(0, 1) for teacher in teachers]
    return draws_for(teachers[0].head, torch.cat(sampled)[::2], float(np.mean(sizes)))


def _is_ours(scheme: Scheme) -> bool:
    return scheme.name == "threshold 16"


def judge(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Return rows that compare ours with RS-KD as ratios, and the bars."""
    ratios, judged = [], float("nan")
    for student in STUDENTS:
        mine = {r["scheme"]: r for r in rows if r["domain"] == "all" and r["student"] == student}
        published = mine[f"RS-KD {PUBLISHED_DRAWS} draws"]
        within = [r for r in mine.values() if r["family"] in OURS]
        largest = max(
            (r for r in within if r["bytes"] <= published["bytes"]), key=lambda r: r["bytes"]
        )
        ours = mine["threshold 16"]
        equal = [
            r for n, r in mine.items() if n.startswith("RS-KD") and r["bytes"] <= ours["bytes"]
        ]
        best_equal = max(equal, key=lambda r: r["bytes"])
        pairs = [(largest, published), (ours, published), (ours, best_equal)]
        pairs += [(r, ours) for r in mine.values() if r["family"] == TAU]
        ratios += [_ratio(left, right) for left, right in pairs]
        if student == "distilled":
            judged = largest[ERROR] / published[ERROR]
    worst = max(r["bytes"] for r in rows if r["scheme"] == "threshold 16")
    average = next(r["bytes"] for r in rows if r["scheme"] == "threshold 16")
    return ratios, [
        at_most("threshold 16: bytes a token on disk, everything counted", average, MAX_BYTES),
        at_most("threshold 16: the same in the worst domain", worst, MAX_BYTES),
        at_most(
            f"mean abs error of the loss over RS-KD's at {PUBLISHED_DRAWS} draws, at no more bytes",
            judged,
            MAX_ERROR_RATIO,
        ),
        *_tau_bars(rows),
    ]


def _tau_bars(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """Compare tau with k = 16 by the worst of both gradients and both students."""
    worst: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for student in STUDENTS:
        mine = {r["scheme"]: r for r in rows if r["domain"] == "all" and r["student"] == student}
        ours = mine["threshold 16"]
        for row in (r for r in mine.values() if r["family"] == TAU):
            ratio = max(row[name] / ours[name] for name in GRADIENTS)
            worst[row["scheme"]] = max(ratio, worst.get(row["scheme"], 0.0))
            sizes[row["scheme"]] = row["bytes"]
    as_good = [sizes[name] for name in worst if worst[name] <= 1.0]
    as_small = [worst[name] for name in worst if sizes[name] <= ours["bytes"]]
    return [
        at_most(
            "tau: bytes a token at no higher gradient error than k = 16",
            min(as_good, default=float("inf")),
            MAX_TAU_BYTES,
        ),
        at_most(
            "tau: gradient error over that of k = 16, at no more bytes",
            min(as_small, default=float("inf")),
            MAX_TAU_ERROR_RATIO,
        ),
    ]


def _ratio(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """Divide every figure of ``left`` by that of ``right``."""
    names = ["bytes", *(name for name in left if name.endswith(("_abs", "_rms", "gradient_error")))]
    return {
        "domain": "ratio",
        "student": left["student"],
        "scheme": f"{left['scheme']} / {right['scheme']}",
        **{name: left[name] / right[name] for name in names},
    }


def _brief(row: dict[str, Any]) -> dict[str, Any]:
    hidden = ("family", "domain", "kl_p50", "hidden_gradient_cosine", "batch_gradient_cosine")
    return {name: value for name, value in row.items() if name not in hidden}


if __name__ == "__main__":
    sys.exit(main())
