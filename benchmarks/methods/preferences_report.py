"""The page and the figure of ``preferences.py``, written from its results alone.

Dimensions: S = seeds, E = prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.bars import markdown_table, written_by
from benchmarks.methods.advantage_peaks import UNLIKELY
from benchmarks.methods.paired import (
    Interval,
    paired_interval,
    plot_intervals,
    said,
    save_figure,
    verdict,
)
from benchmarks.methods.preference_search import FINALISTS
from benchmarks.methods.preference_steps import (
    ADPA,
    ADPA_PLUS,
    DCKD,
    DPO,
    OF_NAME,
    RELEASED,
    SFT_MORE,
    START,
    UNION,
)
from benchmarks.rewarded_grammar.grammar import NOTHING

Array = npt.NDArray[np.float64]
PAPER, OURS = "ADPA", "ours"


@dataclass(frozen=True, slots=True)
class Claim:
    """One student's responses win more often over SFT's than the other's do."""

    text: str
    whose: str
    better: str
    worse: str


CLAIMS = (
    Claim("DCKD beats SFT", PAPER, DCKD.name, START),
    Claim("DCKD beats DPO", PAPER, DCKD.name, DPO.name),
    Claim("ADPA beats DPO", PAPER, ADPA.name, DPO.name),
    Claim("ADPA beats DCKD", PAPER, ADPA.name, DCKD.name),
    Claim("ADPA+ beats DCKD, from which it starts", PAPER, ADPA_PLUS.name, DCKD.name),
    Claim("ADPA+ beats ADPA", PAPER, ADPA_PLUS.name, ADPA.name),
    Claim("ADPA beats as many steps of SFT more", OURS, ADPA.name, SFT_MORE.name),
    Claim("ADPA as in the paper beats it as released", OURS, ADPA.name, RELEASED.name),
    Claim("union_top_k beats ADPA's default support", OURS, UNION.name, ADPA.name),
    Claim("ADPA of union_top_k beats DPO", OURS, UNION.name, DPO.name),
)


def of(measured: Mapping[str, Any], student: str, what: str) -> Array:
    """Return ``wins``, ``reward`` [S, E], or another measure [S]."""
    return np.array(measured["students"][student][what], np.float64)


def win_rates(measured: Mapping[str, Any]) -> dict[str, Interval]:
    """Return each method's win rate over SFT less one half, best first."""
    methods = [name for name in measured["students"] if name != START]
    found = {name: paired_interval(of(measured, name, "wins") - 0.5) for name in methods}
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def half_width(measured: Mapping[str, Any]) -> float:
    """Return half the widest interval of a win rate or of a claim's difference of two."""
    intervals = [
        *win_rates(measured).values(),
        *(effect(measured, claim, "wins") for claim in CLAIMS),
    ]
    return max((high - low) / 2 for _, low, high in intervals)


def effect(measured: Mapping[str, Any], claim: Claim, what: str) -> Interval:
    """Return the paired difference of a claim's two students."""
    return paired_interval(of(measured, claim.better, what) - of(measured, claim.worse, what))


def table_rows(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row a student, SFT first, then by win rate."""
    rates = win_rates(measured)
    return [_row(measured, START, None), *(_row(measured, *item) for item in rates.items())]


def _row(measured: Mapping[str, Any], name: str, won: Interval | None) -> dict[str, Any]:
    mean, low, high = won or (0.0, 0.0, 0.0)
    return {
        "student": _label(name),
        "settings": _settings(measured, name),
        "true reward": round(float(of(measured, name, "reward").mean()), 3),
        "win rate over SFT, 95 %": f"{0.5 + mean:.3f} [{0.5 + low:.3f}, {0.5 + high:.3f}]"
        if won
        else "",
        "teacher's reward": round(float(of(measured, name, "implicit").mean()), 4),
        "KL to SFT": round(float(of(measured, name, "kl").mean()), 4) + 0.0,
        "unlikely tokens": f"{float(of(measured, name, 'unlikely').mean()):.1%}",
        "tokens": round(float(of(measured, name, "tokens").mean()), 1),
    }


def _label(name: str) -> str:
    return "SFT" if name == START else OF_NAME[name].label


def _settings(measured: Mapping[str, Any], name: str) -> str:
    if name == START:
        return ""
    chosen = measured["chosen"][name]
    strength = OF_NAME[name].strength
    said_of = f"lr {chosen['rate']:g}"
    return f"{said_of}, {strength} {chosen[strength]:.3g}" if strength else said_of


def verdict_rows(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row a claim: the differences of win rate and true reward, and the verdict."""
    rows = []
    for claim in CLAIMS:
        won = effect(measured, claim, "wins")
        earned = effect(measured, claim, "reward")
        rows.append(
            {
                "claim": claim.text,
                "whose": claim.whose,
                "win rate, 95 %": said(won, 3),
                "true reward, 95 %": said(earned, 2),
                "verdict": verdict(*won[1:]),
            }
        )
    return rows


def search_rows(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row a method: its win rate over SFT at every learning rate and strength tried."""
    rows: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(tried["method"] for tried in measured["search"]):
        tries = [tried for tried in measured["search"] if tried["method"] == name]
        rates = [tried for tried in tries if tried["factor"] == 1.0]
        best = max(rates, key=itemgetter("win_rate"))
        row = rows.setdefault(name, {"win rate over SFT": _label(name)})
        for tried in tries:
            if tried["factor"] == 1.0:
                at = f"lr {tried['rate']:g}"
            elif tried["rate"] == best["rate"]:
                at = f"x {tried['factor']:.2g}"
            else:
                at = f"then lr {tried['rate']:g}"
            row[at] = round(tried["win_rate"], 3)
    columns = sorted({column for row in rows.values() for column in row}, key=_place)
    return [{column: row.get(column, "") for column in columns} for row in rows.values()]


def finalist_rows(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row a method: win rates on both seeds of the settings that were tried on both."""
    rows = []
    for name in dict.fromkeys(tried["method"] for tried in measured["search"]):
        both = [
            tried
            for tried in measured["search"]
            if tried["method"] == name and "won_again" in tried
        ]
        both.sort(key=lambda tried: -tried["win_rate"])
        cells = {
            f"{place}.": f"{_tried(tried)}: {tried['win_rate']:.3f}, {tried['won_again']:.3f}"
            for place, tried in enumerate(both, 1)
        }
        rows.append({"settings: win rates": _label(name)} | cells)
    return rows


def _tried(tried: Mapping[str, Any]) -> str:
    times = f", x {tried['factor']:.2g}" if OF_NAME[tried["method"]].strength else ""
    return f"lr {tried['rate']:g}{times}"


def _place(column: str) -> tuple[int, float]:
    """Order columns: the method, learning rates, strengths, learning rates again."""
    kinds = ("win", "lr", "x", "then")
    kind, _, value = column.partition(" ")
    return kinds.index(kind), 0.0 if kind == "win" else float(value.removeprefix("lr "))


def weight_rows(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row a weight of ADPA's search: what its optimum holds, what its student did."""
    rows = []
    for weight, held in zip(measured["weights"], measured["peaks"]["optima"], strict=True):
        tries = [
            tried
            for tried in measured["search"]
            if tried["method"] == ADPA.name and ADPA.centre * tried["factor"] == weight
        ]
        best = max(tries, key=itemgetter("win_rate"))
        rows.append(
            {
                "gamma": f"{weight:.3g}",
                "optimum, unlikely tokens": f"{held:.1%}",
                "ADPA writes of them": f"{best['unlikely']:.1%}",
                "expected advantage": round(best["advantage"], 3),
                "steps cut": f"{best['cut']:.0%}",
                "win rate over SFT": round(best["win_rate"], 3),
            }
        )
    return rows


PAGE = """# Preferences: does what the teacher prefers arrive, and is it better?

{written_by} A grammar
(`benchmarks/rewarded_grammar/grammar.py`) writes responses to prompts; a programmed reward, at most
8.5, orders them: asked-for nouns once each, the rare one of two verbs that agree, greeting and
emphasis in two of four styles each; all else costs. What earns most is not what is likely: the
grammar's own responses earn {grammar_reward:.2f}. {pairs:,} pairs, rewards at least {gap:g} apart.

The teacher ({teacher_parameters:,} parameters) learns {texts:,} texts, the chosen responses (its
reference), then the pairs by `teacher_align`: its implicit reward orders {accuracy:.3f} of
{heldout:.0f} held-out pairs. Students ({student_parameters:,}) learn the texts and the chosen
responses: SFT. Every method goes on from there for {steps} steps of {batch_size} pairs, ADPA+ from
DCKD, so it has trained for twice as many. {seeds} seeds with weights, order and sampling of their
own; {questions:,} new prompts with {responses} sampled responses each, at temperature 1.

{verdicts}

Effects are differences of the win rate over SFT's responses to the same prompts, by the true reward
(a tie is half a win), and of the true reward itself, paired over seeds and prompts; 95 % over new
seeds and new prompts (two-way cluster bootstrap, Student's t over seeds); a verdict is on the win
rate. The paper is ADPA (arXiv 2502.17927): ADPA+ over ADPA over DCKD over the other baselines.

![win rates, and true reward by KL](evidence_preferences.png)

{table}

- **The teacher's reward** is its log-ratio to its reference times {beta:g}, **KL** is that of the
  student to SFT on its own responses, in nats a token, **unlikely tokens** are those written to
  which the teacher's reference gives less than {bound:g}; none of them decides a verdict.
- `as_released` has the published code's support ({released_k} tokens) and clipped advantages,
  `union_top_k` (k {union_k}) one advantage for all tokens that are among no model's likeliest.
- An empty response makes no row, so both of its prompt's earn {nothing:g}, what a response without
  words earns.

## Where ADPA's weight takes a student

At the positions of SFT's responses this teacher's largest advantage is {largest:+.2f} nats on
average, at {unlikely:.0%} of positions on an unlikely token; the token written has {written:+.2f},
the teacher itself would expect {aligned:+.2f}, its KL to its reference. With the reference p in the
place of chosen responses ADPA's loss of a position, `-sum_a p log pi - gamma sum_a pi A`, is least
at `pi = p / (lambda - gamma A)`. If p is 0 on the token of the largest A, nothing goes there while
gamma is at most `sum_a p / (A_max - A)`, and one less that over gamma beyond. The median of this
limit is {limit:.2f}; the published gamma is 1.6, of advantages without beta as all here.

{weights}

- **Optimum**: the mass of those pi on unlikely tokens (the reference has {on_unlikely:.2%} there).
  The other columns are the search's runs of ADPA: tokens written, the last `advantage` that
  training logged, logged steps whose gradient was longer than `max_grad_norm`.
- More expected advantage than the teacher's own is on tokens that neither teacher would write.

## The search

The same for all methods: three learning rates at the published strength; at the best of them other
strengths (beta of DPO, alpha of DCKD, gamma of ADPA); at the best of these the other learning rates
again. Win rates over SFT on {trials} prompts of their own, a seed that is not among those above.
"x" is times a strength of {strengths}.

{search}

The best {finalists} of each were tried on a second seed; the mean of both decides, as what wins on
one seed may be lost on the next.

{both}
"""


def write_docs(folder: Path, measured: Mapping[str, Any], *, quick: bool) -> None:
    """Write ``evidence_preferences.md`` and its figure."""
    from benchmarks.methods.preference_steps import BETA, METHODS

    size = measured["settings"]["size"]
    strengths = ", ".join(
        f"{method.centre:g} ({method.label})" for method in METHODS if method.strength
    )
    page = PAGE.format(
        written_by=written_by("benchmarks/methods/preferences.py", quick=quick),
        **size,
        **measured["peaks"],
        bound=UNLIKELY,
        nothing=NOTHING,
        grammar_reward=measured["grammar_reward"],
        gap=measured["least_gap"],
        teacher_parameters=measured["parameters"]["teacher"],
        student_parameters=measured["parameters"]["student"],
        accuracy=measured["teacher"]["accuracy"],
        heldout=measured["teacher"]["pairs"],
        seeds=measured["settings"]["seeds"],
        beta=BETA,
        strengths=strengths,
        verdicts=markdown_table(verdict_rows(measured)),
        table=markdown_table(table_rows(measured)),
        search=markdown_table(search_rows(measured)),
        both=markdown_table(finalist_rows(measured)),
        finalists=FINALISTS,
        weights=markdown_table(weight_rows(measured)),
        released_k=RELEASED.support["k"],
        union_k=UNION.support["k"],
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evidence_preferences.md").write_text(page)
    plot(folder / "evidence_preferences.png", measured)


def plot(path: Path, measured: Mapping[str, Any]) -> None:
    """Draw win rates with their intervals beside true reward by KL, a point a seed."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.2))
    rates = win_rates(measured)
    plot_intervals(
        left,
        {_label(name): interval for name, interval in rates.items()},
        "win rate over SFT less one half, by the true reward",
    )
    for name in (START, *rates):
        rewards_S = of(measured, name, "reward").mean(axis=1)
        right.plot(of(measured, name, "kl"), rewards_S, "o", markersize=5, label=_label(name))
    right.set_xlabel("KL to SFT, nats a token")
    right.set_ylabel("true reward, a point a seed")
    right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    save_figure(figure, path)
