"""The page and the figure of ``distributions.py``, written from its results alone.

Dimensions: S = seeds, E = held-out sequences.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from benchmarks.bars import markdown_table, written_by
from benchmarks.methods.distribution_methods import (
    DEFAULT,
    DRAWS,
    EXACT,
    FIXED,
    GHOST,
    RENORMALISED,
    TEXT,
)
from benchmarks.methods.paired import (
    Interval,
    paired_interval,
    plot_intervals,
    said,
    save_figure,
    verdict,
)

Array = npt.NDArray[np.float64]
Kls = Mapping[str, Array]
SHARE = 0.1  # "as good as": within this share of what whole distributions gain over text
PAPER = "RS-KD"


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim on an effect [S, E] in nats of held-out KL to the truth, and whose claim it is."""

    text: str
    whose: str
    effect: Callable[[Kls], Array]
    claim: Literal["greater", "less"]


def _less(one: str, other: str) -> Callable[[Kls], Array]:
    return lambda kls: kls[one] - kls[other]


def _as_good(one: str, other: str) -> Callable[[Kls], Array]:
    """The effect less a share of what whole distributions gain: below 0 is as good."""
    return lambda kls: kls[one] - kls[other] - SHARE * (kls[TEXT] - kls[EXACT])


CLAIMS = (
    Claim(
        "whole distributions beat text alone (2.75 against 2.81)", PAPER, _less(EXACT, TEXT), "less"
    ),
    Claim(
        "top-12 that sums to one is worse than text alone (2.87 against 2.81)",
        *(PAPER, _less(RENORMALISED, TEXT), "greater"),
    ),
    Claim("50 random draws beat text alone", PAPER, _less(DRAWS, TEXT), "less"),
    Claim(
        "50 random draws are as good as whole distributions", PAPER, _as_good(DRAWS, EXACT), "less"
    ),
    Claim(
        "top-12 with a bucket for the rest (a ghost token) beats top-12 that sums to one",
        *(PAPER, _less(GHOST, RENORMALISED), "less"),
    ),
    Claim(
        "50 random draws beat top-12 with a bucket for the rest", PAPER, _less(DRAWS, GHOST), "less"
    ),
    Claim(
        "the default encoding is as good as 50 random draws",
        "ours",
        _as_good(DEFAULT, DRAWS),
        "less",
    ),
    Claim(
        "a threshold of k 16 is as good as 50 random draws", "ours", _as_good(FIXED, DRAWS), "less"
    ),
    Claim(
        "the default encoding is as good as whole distributions",
        *("ours", _as_good(DEFAULT, EXACT), "less"),
    ),
)


def kls_of(measured: Mapping[str, Any]) -> dict[str, Array]:
    """Return held-out KL to the truth [S, E] of each method."""
    return {name: np.array(of["kl_SE"]) for name, of in measured["methods"].items()}


def effects_over_text(measured: Mapping[str, Any]) -> dict[str, Interval]:
    """Return each method's effect over cross-entropy, best first."""
    kls = kls_of(measured)
    found = {
        name: paired_interval(kl_SE - kls[TEXT]) for name, kl_SE in kls.items() if name != TEXT
    }
    return dict(sorted(found.items(), key=lambda item: item[1][0]))


def table_rows(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row a method, best first, with its effect over cross-entropy."""
    kls, effects = kls_of(measured), effects_over_text(measured)
    rows = []
    for name in sorted(kls, key=lambda each: float(kls[each].mean())):
        of = measured["methods"][name]
        rows.append(
            {
                "trained on": of["label"],
                "lr": f"{of['rate']:g}",
                "entries": round(of["entries"], 1) or "",
                "bytes a position": round(of["bytes"], 1) or "",
                "KL to the truth": round(float(kls[name].mean()), 4),
                "over cross-entropy, 95 %": "" if name == TEXT else said(effects[name]),
            }
        )
    return rows


def verdict_rows(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row a claim: its effect, interval and verdict."""
    kls = kls_of(measured)
    rows = []
    for claim in CLAIMS:
        interval = paired_interval(claim.effect(kls))
        told = {"claim": claim.text, "whose": claim.whose, "effect, 95 %": said(interval)}
        rows.append(told | {"verdict": verdict(*interval[1:], claim.claim)})
    return rows


PAGE = """# Distributions: which target brings a student nearest to the truth

{written_by} The teacher is a
source in closed form (`benchmarks/known_source/source.py`): sequences of one of two hidden
topics, n-grams over {vocab} tokens that fall as rank^-0.9 to rank^-1.8, and with 15 or 35 % a
copy of one of the last 8 tokens. Its true distribution at each position is known (entropy
{entropy:.2f} nats), so KL is to the truth and not to a model of it. Students: Llamas of {layers}
layers, width {width}, from random weights; {steps} steps of {batch_size} rows of {length} tokens,
each row once ({tokens:,} tokens); {seeds} seeds with rows, weights, order and draws of their own;
{heldout} held-out sequences. All targets of a seed have the same rows, weights, order and steps.

{verdicts}

Effects are differences of held-out KL to the truth in nats a position, paired over seeds and
sequences; intervals are of 95 % over new seeds and new sequences (two-way cluster bootstrap,
Student's t over seeds). "As good as" is worse by no more than a tenth of what whole distributions
gain over text: that tenth is taken off the effect. The paper is RS-KD (arXiv 2503.16870), its
numbers are LM losses of a 300M student of a 3B teacher.

![effects over cross-entropy, and KL by bytes a position](evidence_distributions.png)

{table}

- **Entries and bytes** are means a scored position. Bytes are those of our tables with all
  columns, at a vocabulary of {vocab}; of RS-KD they are the published 3 bytes for each distinct
  token. `top-k renormalised` and RS-KD's draws were written as rows of axolotl and DistillKit and
  came in by `teachercache import`; the others are encodings of `teacher_logits`.
- **The same search for all**: held-out KL after the same steps at each learning rate, on a seed
  and held-out rows of their own. Each family of targets takes its own best.

{search}

- **Why top-k that sums to one loses**: its best student gives the dropped tokens nothing, and
  KL(truth, student) counts their mass. {dropped}
- **What one bucket for the rest lacks** is how its mass is spread: the student is free there, and
  in a source with long tails that is where it is far from the truth.
- **`exact` has no place in the curve**: this source has few distinct n-grams and its states repeat,
  so they compress as no language model's do; uncompressed they are 2 bytes a token of the
  vocabulary.
- The source's own KL to its cached table is {own_kl:.1e}: what float16 costs.
"""


def write_docs(folder: Path, measured: Mapping[str, Any], *, quick: bool) -> None:
    """Write ``evidence_distributions.md`` and its figure."""
    settings = measured["settings"]
    tokens = settings["rows"] * settings["length"]
    numbers = settings | {"vocab": measured["vocab_size"], "tokens": tokens}
    page = PAGE.format(
        written_by=written_by("benchmarks/methods/distributions.py", quick=quick),
        **numbers,
        entropy=measured["entropy"],
        own_kl=measured["own_kl"],
        verdicts=markdown_table(verdict_rows(measured)),
        table=markdown_table(table_rows(measured)),
        search=markdown_table(_search_rows(measured)),
        dropped=_dropped(measured),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evidence_distributions.md").write_text(page)
    plot(folder / "evidence_distributions.png", measured)


def _search_rows(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    labels = {name: of["label"] for name, of in measured["methods"].items()}
    return [
        {"KL at learning rate": labels[family]} | {rate: round(kl, 4) for rate, kl in of.items()}
        for family, of in measured["search"].items()
    ]


def _dropped(measured: Mapping[str, Any]) -> str:
    mass = " and ".join(f"{share:.2f} (k {k})" for k, share in measured["top_mass"].items())
    return f"The k largest tokens of this source hold {mass} of the mass, on average."


def plot(path: Path, measured: Mapping[str, Any]) -> None:
    """Draw effects with their intervals beside KL by bytes a position, a line a family."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.6))
    methods, kls = measured["methods"], kls_of(measured)
    effects = effects_over_text(measured)
    label = "KL to the truth less that of cross-entropy, nats"
    plot_intervals(left, {methods[name]["label"]: each for name, each in effects.items()}, label)
    families = dict.fromkeys(of["family"] for of in methods.values() if of["family"] in _FAMILY)
    for family in families:
        names = [name for name, of in methods.items() if of["family"] == family]
        names.sort(key=lambda name: float(methods[name]["bytes"]))
        sizes = [methods[name]["bytes"] for name in names]
        values = [kls[name].mean() for name in names]
        right.plot(sizes, values, "o-", markersize=4, label=_FAMILY[family])
    for name in (TEXT, EXACT):
        right.axhline(kls[name].mean(), color="black", linewidth=0.8, linestyle="--")
        place = (0.98, float(kls[name].mean()))
        right.annotate(
            name, place, xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )
    right.set_xlabel("bytes a position")
    right.set_ylabel("held-out KL to the truth, nats")
    right.legend(fontsize=8)
    save_figure(figure, path)


_FAMILY = {
    DEFAULT: "threshold, tau",
    FIXED: "threshold, k",
    DRAWS: "RS-KD's draws (published layout)",
    GHOST: "top-k and the rest",
    RENORMALISED: "top-k renormalised",
}
