"""What the page's charts, graph, samples and costs say, each held to something worked by hand."""

import json
import sys
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline.reports.page.break_even import BreakEven, Signal, break_evens
from pipeline.reports.page.charts import MOST_POINTS, curves, histogram, thinned
from pipeline.reports.page.distributions import distribution, distributions_of
from pipeline.reports.page.page import _source_of, json_text
from pipeline.reports.page.plan_graph import BOX_HEIGHT, BOX_WIDTH, draw
from pipeline.reports.page.sampled_rows import SHARDS_READ, SampledRow, sample_rows
from pipeline.reports.page.table_section import table_section
from pipeline.reports.page.token_view import entropies_sample, logits_sample, mask_sample
from pipeline.reports.page.words import Tokenizers, Words
from pipeline.reports.step_times import MeasuredTime
from pipeline.state.step_state import finished_manifest
from schemas.dataset import open_dataset
from schemas.distribution import STICK_LEVELS, unpack_threshold
from schemas.storage.shards import ROWS_PER_BATCH
from schemas.tables.documents import Document
from schemas.tables.span_masks import SpanMask
from schemas.tables.token_entropies import TokenEntropies
from stages.models.checkpoints.tokenizer import open_tokenizer
from tests.fixtures.tiny_recipe import TinyRecipe, teachercache

HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> & \u2028 \u2029"


def test_json_ends_no_script_and_says_the_same() -> None:
    text = json_text({HOSTILE: [HOSTILE, 1.5, None]})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {HOSTILE: [HOSTILE, 1.5, None]}


def test_the_break_even_is_the_one_worked_by_hand(every_kind: TinyRecipe) -> None:
    """100 s for 50 rows; a run reads 40 rows: 80 s live, 4 s from the cache; 100 / 76 runs."""
    steps = every_kind.plan()
    made = MeasuredTime(100.0, 50, 500, 5)
    signals = {"signals": Signal(50, made, 0.1)}
    (found,) = break_evens(steps, signals, {"distilled": 40})
    assert (found.student, found.signals, found.num_rows) == ("distilled", ("signals",), 40)
    assert (found.capture_s, found.live_s, found.reading_s) == (100.0, 80.0, 4.0)
    assert found.runs == pytest.approx(100 / 76)
    slow = {"signals": Signal(50, made, 3.0)}
    assert break_evens(steps, slow, {"distilled": 40})[0].runs is None  # reading takes longer
    untold = {"signals": Signal(50, replace(made, seconds=None), 0.1)}
    for given, rows, why in (
        (untold, {"distilled": 40.0}, "tells no times"),
        (signals, {}, "not trained yet"),
        ({}, {"distilled": 40.0}, "no rows to look at"),
    ):
        (unknown,) = break_evens(steps, given, rows)
        assert why in unknown.missing and unknown.runs is None


def test_each_signal_of_several_data_sets_is_about_its_own_rows(every_kind: TinyRecipe) -> None:
    """A run reads 40 rows, 10 of the one and 30 of the other: 2 s live each, 1 s and 6 s read."""
    steps = every_kind.plan("steps.distilled.data=[documents, signals, documents, states]")
    signals = {
        "signals": Signal(50, MeasuredTime(100.0, 50, 500, 5), 0.1),
        "states": Signal(150, MeasuredTime(300.0, 150, 500, 5), 0.2),
    }
    (found,) = break_evens(steps, signals, {"distilled": 40})
    assert (found.capture_s, found.live_s) == (400.0, 80.0)
    assert found.reading_s == pytest.approx(7.0)


def test_of_a_sampled_capture_time_the_whole_table_is_told(every_kind: TinyRecipe) -> None:
    made = MeasuredTime(10.0, 20, 200, 2)  # of 20 of its 50 rows
    (found,) = break_evens(
        every_kind.plan(), {"signals": Signal(50, made, 0.0)}, {"distilled": 100}
    )
    assert (found.capture_s, found.live_s, found.runs) == (25.0, 50.0, 0.5)
    assert BreakEven("s", ()).runs is None


def test_bins_count_every_value() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=1000)
    found = distribution("entropy", "nats", values)
    assert sum(found.counts) == found.num_values == 1000 and not found.is_whole
    edges = np.asarray(found.edges)
    by_hand = [
        int(((values >= a) & ((values < b) | (b == edges[-1]))).sum()) for a, b in pairwise(edges)
    ]
    assert list(found.counts) == by_hand
    assert found.mean == pytest.approx(values.mean())
    assert found.quantiles[2] == pytest.approx(np.median(values))
    ranks = distribution("rank", "", np.array([1.0, 2, 2, 4]))
    assert ranks.is_whole and ranks.counts == (1, 2, 0, 1) and ranks.edges == (1, 2, 3, 4, 5)
    assert distribution("one value", "", np.array([0.5, 0.5])).counts == (2,)


def test_charts_are_of_the_theme_and_escape_what_they_say() -> None:
    bars = histogram(distribution("entropy", "nats", np.array([0.1, 0.2, 0.2, 3.0])))
    assert "var(--series-1)" in bars and bars.count('aria-roledescription="bar"') == 32
    points = [{"x": n, "y": 1 / n, "series": HOSTILE} for n in (1, 2, 3)]
    line = curves(points, x="step", y="loss", about="loss")
    assert "<script" not in line and "&lt;script&gt;" in line
    for refused in ("style=", "href=", "url(", "#000"):
        assert refused not in bars + line
    thin = thinned(list(range(1000)))
    assert len(thin) == MOST_POINTS and (thin[0], thin[-1]) == (0, 999)


def test_boxes_stand_below_what_they_need_and_apart() -> None:
    needs = {
        "text": [],
        "signals": ["text"],
        "student": [],
        "kd": ["text", "signals", "student"],
        "ce": ["text", "student"],
        "results": ["kd", "ce", "text"],
    }
    found = draw(needs)
    at = {box.name: box for box in found.boxes}
    assert set(at) == set(needs)
    assert {(first, last) for first, last, _ in found.lines} == {
        (first, last) for last, all_needed in needs.items() for first in all_needed
    }
    for last, all_needed in needs.items():
        assert all(at[first].y + BOX_HEIGHT < at[last].y for first in all_needed)
    for one, other in combinations(found.boxes, 2):
        assert one.y != other.y or abs(one.x - other.x) >= BOX_WIDTH
    assert all(box.x >= 0 and box.x + BOX_WIDTH <= found.width for box in found.boxes)
    assert all(box.y >= 0 and box.y + BOX_HEIGHT <= found.height for box in found.boxes)
    assert draw({}).boxes == ()


@pytest.mark.parametrize("text", ["déjà 你好 \U0001f469\u200d\U0001f4bb, <b>\n  x", "plain words"])
def test_pieces_end_to_end_are_the_text(tiny_model: Path, text: str) -> None:
    tokenizer = open_tokenizer(tiny_model)
    ids = tokenizer(text)["input_ids"]
    pieces = Words(tokenizer).pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text
    assert Words(None).pieces([3, 4]) == ["3 ", "4 "]


def test_samples_are_the_rows_of_the_table(every_kind: TinyRecipe) -> None:
    """Entropies, log-probs and the kept entries of a shown token are those that a trainer reads."""
    step, documents = every_kind.step("signals"), every_kind.step("documents")
    manifest = finished_manifest(step)
    assert manifest is not None
    sample = sample_rows(step, manifest, documents)
    assert sample.is_whole and not sample.without_source
    dataset = open_dataset([documents.place, step.place])
    rows = {row["sample_id"]: row for row in map(dataset.__getitem__, range(len(dataset)))}
    words = Tokenizers().words_of(step)
    for sampled in sample.rows[:3]:
        row = rows[sampled.row.sample_id]
        shown = logits_sample(sampled, words)
        (part,) = shown["parts"]
        tokens = part["tokens"]
        assert "".join(token[0] for token in tokens) == words.text(row["input_ids_T"].tolist())
        assert tokens[0][1] == [None, None]  # the first token has no context
        entropies = [token[1][0] for token in tokens[1:]]
        np.testing.assert_allclose(entropies, row["entropies_P"].astype(float), rtol=1e-3)
        surprises = [token[1][1] for token in tokens[1:]]
        np.testing.assert_allclose(
            surprises, -row["next_token_logprobs_P"].astype(float), rtol=1e-3
        )
        weights_PK = unpack_threshold(
            *(row[n] for n in ("token_ids_PK", "num_head_P", "head_codes_E"))
        )
        best = [float(token[2][0][1]) for token in tokens[1:]]
        np.testing.assert_allclose(best, weights_PK.max(axis=1), rtol=1e-3)
    entropy, surprise, mass, *_ = distributions_of("teacher_logits", sample.rows)
    every = np.concatenate([row["entropies_P"] for row in rows.values()]).astype(float)
    assert entropy.mean == pytest.approx(every.mean())
    assert entropy.num_values == len(every)
    assert surprise.num_values == mass.num_values == len(every)
    kept = [
        1 - np.prod(1 - STICK_LEVELS[codes])  # what a broken stick leaves
        for row in rows.values()
        for codes in np.split(row["head_codes_E"], np.cumsum(row["num_head_P"].astype(int))[:-1])
    ]
    assert mass.mean == pytest.approx(np.mean(kept), rel=1e-5)


def test_what_positions_are_selected_by_is_shown_on_the_text(tiny_model: Path) -> None:
    """Of entropies each token but the first has its own, of a mask the text is cut at its spans."""
    words = Words(open_tokenizer(tiny_model))
    ids_T = np.arange(20, 26)
    text = Document(sample_id="a" * 24, split="train", input_ids_T=ids_T)
    entropies_P = np.array([0.5, 2.0, 1.5, 0.25, 4.0], np.float16)
    unsure = TokenEntropies(sample_id=text.sample_id, token_entropies_P=entropies_P)
    (part,) = entropies_sample(SampledRow(0, "train", unsure, text), words)["parts"]
    assert [token[1][0] for token in part["tokens"]] == [None, *entropies_P.tolist()]
    short = TokenEntropies(sample_id=text.sample_id, token_entropies_P=entropies_P[:3])
    with pytest.raises(ValueError, match="3 entropies are not about its input's 5 tokens"):
        entropies_sample(SampledRow(0, "train", short, text), words)
    mask = SpanMask(sample_id=text.sample_id, selected_S2=np.array([[1, 2], [4, 6]]))
    parts = mask_sample(SampledRow(0, "train", mask, text), words)["parts"]
    shown = [(part["name"], len(part["tokens"])) for part in parts]
    assert shown == [("read", 1), ("selected", 1), ("read", 2), ("selected", 2)]


def test_of_a_large_table_some_rows_are_read(
    every_kind: TinyRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.reports.page.sampled_rows.SHARDS_READ", 2)
    monkeypatch.setattr("pipeline.reports.page.sampled_rows.BATCHES_READ", 1)
    step = every_kind.step("signals")
    manifest = finished_manifest(step)
    assert manifest is not None and len(manifest.shards) > 2
    first, second = (sample_rows(step, manifest, None) for _ in range(2))
    assert first.num_shards == 2 < SHARDS_READ and not first.is_whole
    assert 0 < len(first.rows) <= ROWS_PER_BATCH
    assert [row.index for row in first.rows] == [row.index for row in second.rows]
    dataset = open_dataset([step.place])
    whole = [dataset[at]["sample_id"] for at in range(len(dataset))]
    assert [whole[row.index] for row in first.rows] == [row.row.sample_id for row in first.rows]


def test_a_command_without_the_extra_names_it(
    every_kind: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    said = teachercache("report", every_kind.path, "--output", tmp_path / "page.html")
    assert said.code == 2 and "install teachercache[report]" in said.error
    assert not (tmp_path / "page.html").exists()


def test_a_table_made_elsewhere_finds_its_text(every_kind: TinyRecipe) -> None:
    """It names what it was made of by fingerprint alone; without that its numbers are shown."""
    signals, documents = every_kind.step("signals"), every_kind.step("documents")
    body = yaml.safe_load(every_kind.path.read_text())
    body["steps"] = {
        name: {"stage": "finished_table", "folder": str(step.place)}
        for name, step in (("text", documents), ("said", signals))
    }
    path = every_kind.path.with_name("finished.yaml")
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    recipe = TinyRecipe(path, every_kind.root)
    text, said = recipe.plan()
    manifest = finished_manifest(said)
    assert manifest is not None
    assert _source_of([text, said], said) is text and _source_of([said], said) is None
    with_text = table_section(said, manifest, text, Tokenizers())
    assert with_text.samples and not with_text.problems
    alone = table_section(said, manifest, None, Tokenizers())
    assert alone.charts and not alone.samples and not alone.problems
    assert any("without text" in note for note in alone.notes)
