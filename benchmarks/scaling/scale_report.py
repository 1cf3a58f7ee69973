"""Write what ``scale_simulation.py`` found as ``scaling.md`` and ``scaling.png``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.bars import Bar, bars_table, markdown_table
from benchmarks.scaling.scale_costs import Driver
from benchmarks.scaling.scale_results import PARTS, Measured, Result
from benchmarks.scaling.shard_times import ShardTimes

matplotlib.use("Agg")

COLOURS = ("#008176", "#e8871e", "#0000a7", "#c1272d", "#7a3fa0", "#66b3a8", "#bbbbbb", "#d9a5c7")
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
PAGE = """# Scaling: how to size a run, and what gives first

Regenerate with `python benchmarks/scaling/scale_simulation.py --docs docs/measured/` (the figures
below come from that run). The dispatcher in it is the real one (`pipeline/executors/dispatch.py`);
its workers are simulated on a virtual clock, with shard times drawn from real runs.

![where the workers' time goes](scaling.png)

## Sizing

With *N* tokens, *W* workers of *v* tokens/s each, *t* tokens a shard and *e* the efficiency below:

| what | formula | 10^12 tokens, 1,000 workers, 10^6 tokens a shard |
| --- | --- | --- |
| hours | N / (e W v) / 3600 | {hours:.1f} with v = {speed:,.0f} and e = {efficiency:.2f} |
| workers | N / (e v 3600 hours) | for one day: {workers_a_day:,.0f} |
| shards | N / t | {shards:,.0f} |
| seconds a shard | t / v | {shard_s:.0f} |
| disk, with the ids | 33 B x N at k = 16 ([storage](storage.md)) | {disk_tb:.0f} TB |
| disk, one shard of signals | 33 B x t | {shard_mb:.0f} MB |
| disk, list of shards | {list_bytes:.0f} B x N / t | {list_mb:.0f} MB |
| requests, write | 2 a shard: shard, record (3 with rejects) | {puts:,.0f}; {put_rate:.0f}/s |
| requests, read | 2 a shard: its input is hashed, then read | {gets:,.0f}; {get_rate:.0f}/s |
| lost with a worker | half a shard and the engine's start | {lost_s:.0f} s of one worker |

*v* is yours to measure: what a run prints at its end has it, as positions/s. Rules:

- **Tokens a shard**: so that a shard takes one to ten minutes, t = 60 v to 600 v. With
  {most_workers:,} workers, shards of {driver_floor:.1f} s keep the driver busy all the time; shards
  of ten times that leave it nine tenths idle. Longer ones make a lost worker, a straggler and the
  end of a run cost more, and a shard that is tried row by row.
- **Workers**: at most a hundredth of the shards, or the end of the run shows, when some have
  nothing left to do.
- **execution.shard_timeout_s**: twenty times the median shard; stragglers of 10x are not ended
  before all shards are handed out. From then on a second worker makes them as well.

## The simulation

Measured: times of {num_times} shards of a real run ({teacher}; five rows each, whole documents, so
that shards differ in tokens, more than shards of a thousand rows would), over their mean; what the
driver does for a shard. **Assumed**, and to be replaced by your own: {speed:,.0f} tokens/s a worker
(one GPU, a teacher of some 8 B parameters); 1 % of shards 10x slow on top of the measured tail; a
worker lives {life_h:.0f} h on average (exponential) and takes {load_s:.0f} s to load its engine; an
object store with {latency_ms:.0f} ms a request, {stream_mb:.0f} MB/s a stream, and 3,500 writes and
5,500 reads a second on the one prefix that a table has.

Seconds of a shard over the median, quantiles:

{quantiles}

### More workers (10^9 tokens each, 10^6 a shard)

{by_workers}

"efficiency" is the share of the workers' time that went into the teacher's work which was kept; the
other shares say where the rest went, and add up to it.

### Other sizes of shard, 1,000 workers

{by_size}

These runs, and those below, stop at {most_shards:,} shards. Here the engines are loaded beforehand:
with them, runs of small shards would be over before they show anything else.

### The end of a run, {most_workers:,} workers, with and without second copies

{by_copies}

Once all shards are handed out, an idle worker is given a copy of one that takes over twice the
median; whoever is first has made it, and the other is ended. Stragglers in the middle of a run are
left alone, as no worker is idle then: what they cost follows from the assumption (1 % of shards at
10x are 9 % more work), and no way of handing out shards gets it back: 0.95 is out of reach with
them, and is reached without ("none" below).

### More trouble, 1,000 workers

{by_trouble}

## The first bottleneck

It is the driver, one process that hands out every shard: {driver_ms:.1f} ms a shard with 1,000
workers on Ray (processor time), that is {driver_rate:,.0f} shards a second at most. It takes all
results that are there at once: asking Ray costs as much for one as for a hundred.
The object store comes after it: at that rate a table's prefix sees {limit_puts:,.0f} writes a
second, {limit_share:.0f} % of what one prefix takes, so shards need no folders below the table's.

| workers | dispatcher, us a shard | all of it on Ray, us | most shards/s |
| --- | --- | --- | --- |
{driver}

The dispatcher holds {memory_mb:.0f} MB at most while it hands out {memory_shards:,} shards to
1,000 workers, the list of the input's shards included.

## What was changed because of it

{changes}

`plan` and `status` were measured on a finished input of a million shards and a half-finished step
(two shared cores, several times); the bars, in `tests/runs/test_scale.py`, are 30 s and 1 GiB. The
other times on the right are of the processor. `manifest.json` has the totals and the sha256 of
`shards.feather` (an Arrow IPC file, named so that it is not taken for a shard), which is opened
when a shard is asked for: reading and checking a million takes {list_read:.1f} s.

A shard counts as finished when its record can be read and its file has the size that it says. That
its bytes are those that were written is checked by threads while the workers make the rest, and a
shard that has changed is made again at the end: a step is finished only when all kept shards
verify, as before. The next step hashes each shard once more before it reads it.

## Bars

{bars}
"""


def write_report(folder: Path, found: Measured, bars: Sequence[Bar]) -> None:
    """Write the page and its plot."""
    plot(folder / "scaling.png", found)
    (folder / "scaling.md").write_text(page(found, bars), encoding="utf-8")


def page(found: Measured, bars: Sequence[Bar]) -> str:
    """Return the text of scaling.md."""
    assumed, largest = found.assumed, found.by_workers[-1]
    tokens, workers = 1e12, largest.workers
    shards = tokens / largest.shard_tokens
    efficiency = largest.efficiency
    speed = assumed.tokens_a_second
    seconds = tokens / (efficiency * workers * speed)
    shard_s = largest.shard_tokens / speed
    driver_s = found.driver.on_ray_s[workers]
    disk = tokens * assumed.bytes_a_token
    times = found.times[found.teacher]
    return PAGE.format(
        hours=seconds / 3600,
        speed=speed,
        efficiency=efficiency,
        workers_a_day=tokens / (efficiency * speed * 86_400),
        shards=shards,
        shard_s=shard_s,
        disk_tb=disk / 1e12,
        shard_mb=largest.shard_tokens * assumed.bytes_a_token / 1e6,
        list_bytes=found.listed["bytes a shard"],
        list_mb=found.listed["bytes a shard"] * shards / 1e6,
        puts=2 * shards,
        put_rate=2 * shards / seconds,
        gets=2 * shards,
        get_rate=2 * shards / seconds,
        lost_s=shard_s / 2 + assumed.load_s,
        driver_floor=driver_s * workers,
        most_workers=workers,
        num_times=len(times.seconds_S),
        teacher=found.teacher,
        life_h=assumed.mean_life_s / 3600,
        load_s=assumed.load_s,
        latency_ms=1000 * assumed.store.latency_s,
        stream_mb=assumed.store.bytes_a_second / 1e6,
        quantiles=markdown_table(quantile_rows(found)),
        by_workers=markdown_table([result.row() for result in found.by_workers]),
        by_size=markdown_table([result.row() for result in found.by_size]),
        most_shards=found.most_shards,
        by_copies=markdown_table(
            [{"copying": result.note, **result.row()} for result in found.by_copies]
        ),
        by_trouble=markdown_table(
            [{"trouble": result.note, **result.row()} for result in found.by_trouble]
        ),
        driver_ms=1000 * driver_s,
        driver_rate=1 / driver_s,
        limit_puts=2 / driver_s,
        limit_share=100 * 2 / driver_s / assumed.store.puts_a_second,
        driver=driver_lines(found.driver),
        memory_mb=found.memory / 1e6,
        memory_shards=found.memory_shards,
        changes=markdown_table(changes(found, shards, disk)),
        list_read=found.listed["read and check, s"] * shards / found.listed["shards"],
        bars=bars_table(bars),
    )


def quantile_rows(found: Measured) -> list[dict[str, Any]]:
    """Return a row for each teacher."""
    return [
        {
            "teacher": name,
            "shards": len(times.seconds_S),
            "median, s": float(np.median(times.seconds_S)),
            "tokens, median": float(np.median(times.tokens_S)),
            **{f"q{100 * q:g}": quantile(times, q) for q in QUANTILES},
        }
        for name, times in found.times.items()
    ]


def quantile(times: ShardTimes, q: float) -> float:
    """Return a quantile of the seconds over their median."""
    return float(np.quantile(times.seconds_S, q) / np.median(times.seconds_S))


def changes(found: Measured, shards: float, num_bytes: float) -> list[dict[str, str]]:
    """Return what a million shards showed; the first column of numbers was measured once."""
    listed, resumed = found.listed, found.resumed
    scale = shards / listed["shards"]
    hash_rate = resumed["hash, GB/s a core"]
    hash_hours = num_bytes / 2 / (1e9 * hash_rate) / 3600
    rows = [
        ("`plan`: seconds; peak memory", "15.5 s; 1,014 MiB", "1.1 to 2.1 s; 81 MiB"),
        ("`status`: seconds; peak memory", "21.8 s; 1,017 MiB", "1.1 to 2.1 s; 81 MiB"),
        (
            "`manifest.json`",
            "261 MB",
            f"2 kB, and `shards.feather` of {listed['bytes a shard'] * shards / 1e6:.0f} MB",
        ),
        (
            "writing the manifest: seconds; peak memory",
            "22.4 s; 2.9 GB",
            f"{listed['write, s'] * scale:.1f} s; some 0.3 GB",
        ),
        (
            "a resumed run, half of it done, before its first shard",
            f"hashes what is finished: {hash_hours:.1f} h at {hash_rate:.1f} GB/s",
            f"reads the records, {resumed['record, us']:.0f} us each on a local disk, and hashes "
            "beside the work",
        ),
        (
            "ingest: making one shard of a million",
            "reads the list of all: 2.5 s each, 29 days in all",
            "reads it once",
        ),
        ("progress line after each shard", "sums all shards so far: quadratic", "running sums"),
        (
            "1,000 workers, `shard_timeout_s` set: dispatcher and simulated crew, a shard",
            "98 us, in proportion to the workers",
            "22 us",
        ),
        (
            "1,000 workers on Ray: processor time of the driver, a shard",
            "1.1 ms, results taken one by one",
            "0.6 ms",
        ),
        ("names of shards", "do not sort by index from 100,000 on", "sort by index"),
        ("tasks of a step", "all in memory", "made when a worker is ready"),
        (
            "workers lost in a row before any was ready that end a run",
            "3: of 1,000 that live 24 h, more are lost while they load",
            "as many as there are workers",
        ),
    ]
    return [{"found": what, "before": before, "now": now} for what, before, now in rows]


def driver_lines(driver: Driver) -> str:
    """Return the rows of the table about the driver."""
    return "\n".join(
        f"| {workers:,} | {1e6 * driver.dispatch_s[workers]:.0f} | "
        f"{1e6 * driver.on_ray_s[workers]:.0f} | {1 / driver.on_ray_s[workers]:,.0f} |"
        for workers in driver.dispatch_s
    )


def plot(path: Path, found: Measured) -> None:
    """Draw the shares of the workers' time, by number of workers and by size of shard."""
    figure, panels = pyplot.subplots(1, 3, figsize=(14, 4.6), sharey=True)
    stack(panels[0], found.by_workers, [f"{r.workers:,}" for r in found.by_workers])
    panels[0].set(xlabel="workers, 10⁶ tokens a shard", ylabel="share of the workers' time, %")
    stack(panels[1], found.by_size, [f"{r.shard_tokens:,.0f}" for r in found.by_size])
    panels[1].set(xlabel="tokens a shard, 1,000 workers")
    labels = [f"{r.note}\n{r.shard_tokens:,.0f}" for r in found.by_trouble]
    stack(panels[2], found.by_trouble, labels)
    panels[2].set(xlabel="trouble and tokens a shard, 1,000 workers")
    for panel in panels[1:]:
        panel.tick_params(axis="x", rotation=60, labelsize=8)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", ncols=len(PARTS), frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def stack(panel: Axes, results: Sequence[Result], labels: Sequence[str]) -> None:
    """Draw one bar a run, cut into what its workers' time went for."""
    bottom = np.zeros(len(results))
    for part, colour in zip(PARTS, COLOURS, strict=True):
        heights = np.array([100 * result.shares[part] for result in results])
        panel.bar(range(len(results)), heights, bottom=bottom, color=colour, label=part)
        bottom += heights
    panel.set_xticks(range(len(results)), labels)
    panel.set_ylim(0, 100)
