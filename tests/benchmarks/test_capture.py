"""What capture is held to: vLLM's flat log-probs without texts, and plain prefill."""

from benchmarks.capture.capture import as_row, judge
from benchmarks.capture.capture_workers import FLAT, FLAT_IDS, OURS, PLAIN, Pass


def test_the_bar_is_the_flat_path_without_texts() -> None:
    seconds = {PLAIN: 1.3, OURS: 1.6, FLAT_IDS: 2.0, FLAT: 3.0}
    passes = {way: [Pass(each, 2 * each, 100.0, 1.0)] for way, each in seconds.items()}
    over_flat, over_plain = judge(passes)
    assert (over_flat["value"], over_flat["ok"]) == (1.25, True)
    assert (over_plain["value"], over_plain["ok"]) == (0.8125, True)
    row = as_row(FLAT, passes, 1_000)
    assert (row["speed / flat, no text"], row["speed / plain"]) == (0.667, 0.433)
