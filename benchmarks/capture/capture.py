"""Getting distributions out of vLLM: our path beside prompt_logprobs and plain prefill, one run.

Same prompts (real web text), same settings, float32 SmolLM2-135M on this machine. The generate
runner and the pooling runner are two engines in two processes; every repetition runs every way
once, in turns, and what is compared are the ratios within a repetition (their median), so that a
busy machine slows both sides alike. Processor time is given beside wall time.

Ways: plain prefill (``generate`` of one token, no log-probs); ``prompt_logprobs=64`` as dicts, as
flat lists, and flat without token texts; ours cut short after the hidden states (T0), after the
head's product (T1), and whole (T2: threshold encoding, shard written and flushed to the disk).
The others' log-probs are not even stored.

Bars: ours is at least 1.15 times as fast as the flat path without token texts, which is the fastest
that a careful user has, and at least 0.78 times plain prefill. SmolLM2's head alone is 21 % of its
multiply-adds, so 0.79 of prefill is the most there is.
"""

import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bars import (
    Bar,
    at_least,
    bars_table,
    benchmark_parser,
    finish,
    machine,
    markdown_table,
)
from benchmarks.capture.capture_workers import (
    DICTS,
    FLAT,
    FLAT_IDS,
    HEAD,
    HIDDEN,
    OURS,
    PLAIN,
    Pass,
    Task,
    Worker,
    capturing,
    generating,
)
from benchmarks.storage.real_positions import MODEL, load_domain, missing_asset
from stages.models.spec import EngineOptions

WAYS = (PLAIN, HIDDEN, HEAD, OURS, FLAT_IDS, FLAT, DICTS)
OVER_FLAT, OVER_PLAIN = 1.15, 0.78
K = 16
# prompts, tokens of each, repetitions
FULL = (16, 512, 7)
QUICK = (4, 256, 1)

Passes = Mapping[str, Sequence[Pass]]

TEXT = """# Getting distributions out of vLLM

Regenerate with `python benchmarks/capture/capture.py --docs docs/measured/` (the figures below come
from that run).

One run: {prompts} prompts of {length} tokens of real web text, SmolLM2-135M-Instruct in float32,
vLLM on {threads} CPU threads, {repetitions} repetitions of every way in turns. Ratios are medians
of ratios within a repetition. The machine: {machine}. Ratios carry over to other machines, tokens a
second do not.

{rows}

*Plain prefill* is `LLM.generate` of one token without log-probs. *Ours* is what `teachercache run`
does with `threshold`, k = {k}: T0 stops at the hidden states, T1 after the product with the head,
T2 is all of it, with the shard written and flushed. The `prompt_logprobs` ways end with Python
objects in memory; *no text* leaves out the decoding of every token to a string, which nobody needs
who keeps ids: it is what ours is held to.

## Bars

{bars}

The head takes 21 % of SmolLM2's multiply-adds and plain prefill leaves it out, so a path that ends
with distributions cannot pass 0.79 of prefill's speed on one processor: here that is {ceiling:.2f}
times the flat path without text. That path's own work (a list of 65 Python numbers a position) is
the same on a GPU, where prefill is some hundred times as fast; it was not measured there.
"""
HEAD_SHARE = 0.21


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--docs", type=Path, help="write capture.md there")
    parser.add_argument("--repetitions", type=int, help="default: 7, with --quick 1")
    options = parser.parse_args(arguments)
    if missing := missing_asset(options.cache):
        print(missing)
        return 2
    num_prompts, length, repetitions = QUICK if options.quick else FULL
    repetitions = options.repetitions or repetitions
    passes = measure(options.cache, num_prompts, length, repetitions)
    rows = [as_row(way, passes, num_prompts * length) for way in WAYS]
    bars = judge(passes)
    if options.docs:
        text = TEXT.format(
            prompts=num_prompts,
            length=length,
            repetitions=repetitions,
            threads=_threads(),
            machine=machine(),
            k=K,
            ceiling=(1.0 - HEAD_SHARE) * ratio(passes, PLAIN, FLAT_IDS),
            rows=markdown_table(rows),
            bars=bars_table(bars),
        )
        options.docs.mkdir(parents=True, exist_ok=True)
        (options.docs / "capture.md").write_text(text, encoding="utf-8")
    return finish(bars, rows, options.json)


def measure(cache: Path, num_prompts: int, length: int, repetitions: int) -> Passes:
    """Return the passes of every way, one a repetition."""
    prompts_RT = load_domain(cache, "web", num_prompts).measured_RT[:, :length].numpy()
    engine = EngineOptions(
        device="cpu",
        kv_cache_memory_bytes=1 << 30,
        max_model_len=1024,
        max_num_batched_tokens=4096,
        enforce_eager=True,
        cache_dir=cache / "benchmarks" / "head_check",
    )
    with tempfile.TemporaryDirectory(prefix="capture-") as folder:
        task = Task(cache / MODEL, prompts_RT, engine, Path(folder), K)
        print("starting both engines", flush=True)
        generate, pooling = Worker(generating, task), Worker(capturing, task)
        try:
            generate.wait_until_ready()
            pooling.wait_until_ready()
            return _take_turns(generate, pooling, repetitions)
        finally:
            generate.close()
            pooling.close()


def _take_turns(generate: Worker, pooling: Worker, repetitions: int) -> Passes:
    passes: dict[str, list[Pass]] = {way: [] for way in WAYS}
    for repetition in range(repetitions):
        # Back and forth, so that a drift of the machine's load does not favour the first.
        for way in WAYS if repetition % 2 == 0 else reversed(WAYS):
            worker = pooling if way in (HIDDEN, HEAD, OURS) else generate
            passes[way].append(worker.run(way))
        seconds = ", ".join(f"{way}: {passes[way][-1].seconds:.1f} s" for way in WAYS)
        print(f"repetition {repetition + 1}: {seconds}", flush=True)
    return passes


def ratio(passes: Passes, fast: str, slow: str, *, of: str = "seconds") -> float:
    """Return how many times as fast ``fast`` is as ``slow``: the median over repetitions."""
    pairs = zip(passes[fast], passes[slow], strict=True)
    return float(statistics.median(getattr(b, of) / getattr(a, of) for a, b in pairs))


def as_row(way: str, passes: Passes, num_tokens: int) -> dict[str, Any]:
    """Return a way's line of the table."""
    mine = passes[way]
    return {
        "way": way,
        "tokens/s": round(num_tokens / statistics.median(p.seconds for p in mine), 1),
        "CPU s per 1000 tokens": _rounded(mine, "cpu_seconds", 1000 / num_tokens),
        "speed / plain": round(ratio(passes, way, PLAIN), 3),
        "by CPU time": round(ratio(passes, way, PLAIN, of="cpu_seconds"), 3),
        "speed / flat, no text": round(ratio(passes, way, FLAT_IDS), 3),
        "by CPU time, / flat, no text": round(ratio(passes, way, FLAT_IDS, of="cpu_seconds"), 3),
        "peak RSS MB": round(max(p.peak_mb for p in mine)),
        "of it grown MB": round(max(p.grown_mb for p in mine)),
    }


def _rounded(passes: Sequence[Pass], of: str, scale: float) -> float:
    return round(float(statistics.median(getattr(p, of) for p in passes)) * scale, 3)


def judge(passes: Passes) -> list[Bar]:
    """Return the two bars, by wall time."""
    return [
        at_least(f"ours over {FLAT_IDS}", ratio(passes, OURS, FLAT_IDS), OVER_FLAT),
        at_least("ours over plain prefill", ratio(passes, OURS, PLAIN), OVER_PLAIN),
    ]


def _threads() -> int:
    import torch

    return torch.get_num_threads()


if __name__ == "__main__":
    sys.exit(main())
