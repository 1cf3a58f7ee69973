"""Episodes: exact spans in every subset, draws of what they may use, splits that never overlap."""

import json
import subprocess
import sys
from collections import Counter
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from schemas.errors import ConfigError, StoreError
from schemas.tables.episodes import Episode, split_candidates, subset_input_ids
from stages.sources.episodes.building import EpisodeBuilder
from stages.sources.episodes.draws import DrawnEpisode
from stages.sources.episodes.stage import EpisodesStage
from stages.sources.episodes.templates import TEMPLATES, EpisodeTemplate, template_of
from stages.sources.reading.rejects import Rejects
from stages.sources.reading.tokens import TextTokenizer
from stages.sources.tasks.task import Example, Task
from tests.fixtures.tiny_t5 import END, save_t5_tokenizer

LABELS = ("negative", "neutral", "positive")


def write_task(folder: Path, name: str, count: int, start: int = 0) -> None:
    """Write a task whose example number i is named by its text and labelled by i modulo 3."""
    rows = [(f"{name} number {i}", LABELS[i % 3]) for i in range(start, start + count)]
    body = "".join(f"{text}\t{label}\n" for text, label in rows)
    folder.mkdir(exist_ok=True)
    (folder / f"{name}_16_13_train.tsv").write_text(body)


def stage_for(folder: Path, tokenizer: Path, **changes: Any) -> EpisodesStage:
    settings: dict[str, Any] = {
        "stage": "episodes",
        "sources": [{"kind": "crossfit", "paths": [str(folder)], "task_kind": "classification"}],
        "tokenizer": str(tokenizer),
        "targets": ["target"],
        "paradigm": "meta",
        "demonstrations": 2,
        "draw": "resample",
        "support": 5,
        "max_length": 200,
        "rows_per_shard": 7,
    }
    return EpisodesStage.model_validate(settings | changes)


def rows_of(stage: EpisodesStage, work: Path) -> list[Episode]:
    rows = []
    for index, shard in enumerate(stage.prepare(work).shards):
        of_shard = list(stage.read(work, index))
        assert {row.split for row in of_shard} == {shard.split} and len(of_shard) == shard.rows
        rows += of_shard
    return rows


def refusal(stage: EpisodesStage, work: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        stage.prepare(work)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    for name, count in (("first", 23), ("second", 12), ("target", 11)):
        write_task(tmp_path / "tasks", name, count)
    return tmp_path / "tasks"


class Opened:
    """A tokenizer folder, opened once: ours to make ids, and the library's to read them."""

    def __init__(self, folder: Path) -> None:
        self.ours = TextTokenizer(folder)
        self.decode = AutoTokenizer.from_pretrained(folder).decode


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Opened:
    return Opened(tiny_model)


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def real(request: pytest.FixtureRequest) -> "Opened":
    if request.param == "tiny":
        return Opened(request.getfixturevalue("tiny_model"))
    try:
        return Opened(Path(request.getfixturevalue("smollm2")))
    except AssertionError as error:
        pytest.skip(str(error))


def make_sentencepiece(folder: Path) -> Path:
    """Save a tokenizer as Llama 2's is: a space before every text, byte fallback, a BOS."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = "negative neutral positive number first second target Question Answer : a b c 1 2 3"
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    bpe.train_from_iterator([words] * 3, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.save_pretrained(folder)
    return folder


# Spaces, line breaks, digits, Unicode and text that ends in a space: all that could merge.
EXAMPLES = (
    Example(("A plain sentence.",), "positive", (), "f:1"),
    Example(("ends in a space ",), " negative", (), "f:2"),
    Example(("two\nlines\n",), "caf\u00e9 \u65e5\u672c", (), "f:3"),
    Example((" 12 + 34",), "46", (), "f:4"),
    Example(("the query?",), " positive", (), "f:5"),
)
OPTIONS = ("positive", " negative", "caf\u00e9 \u65e5\u672c", "46", " positive")
PARTS = [*TEMPLATES.values(), EpisodeTemplate(demonstration="{input}{output}", separator="\n")]


def episode_of(builder: EpisodeBuilder, kept: tuple[int, ...]) -> Episode:
    task = Task("t", "classification", EXAMPLES, OPTIONS)
    chosen = tuple(EXAMPLES[index] for index in kept)
    row = builder.build(DrawnEpisode("train", task, chosen, EXAMPLES[-1], 0, 0))
    assert row is not None
    return row


@pytest.mark.parametrize("template", PARTS)
def test_every_subset_is_what_building_it_from_text_gives(
    template: EpisodeTemplate, real: Opened
) -> None:
    builder = EpisodeBuilder(real.ours, template, 250, Rejects())
    whole = episode_of(builder, (0, 1, 2, 3))
    answer = whole.input_ids_T[whole.answer_start :].tolist()
    subsets = chain.from_iterable(combinations(range(4), size) for size in range(5))
    for kept in subsets:
        ids_T = subset_input_ids(
            whole.input_ids_T, whole.demonstrations_M3, whole.query_start, kept
        )
        built = episode_of(builder, kept)
        assert ids_T.tolist() == built.input_ids_T.tolist()
        assert ids_T[built.answer_start :].tolist() == answer
        text = "".join(
            template.query_part(e.inputs[0]) + template.answer_part(e.output) + template.separator
            for e in (EXAMPLES[index] for index in kept)
        )
        query = template.query_part("the query?")
        assert real.decode(ids_T) == f"{text}{query}{template.answer_part(' positive')}"


def test_spans_decode_to_the_text_they_stand_for(real: Opened) -> None:
    builder = EpisodeBuilder(real.ours, TEMPLATES["qa"], 250, Rejects())
    row = episode_of(builder, (3, 1))
    ids_T = row.input_ids_T
    for (start, answer, end), example in zip(
        row.demonstrations_M3.tolist(), (EXAMPLES[3], EXAMPLES[1]), strict=True
    ):
        assert real.decode(ids_T[start:answer]) == f"Question: {example.inputs[0]}\nAnswer:"
        assert real.decode(ids_T[answer:end]) == f" {example.output}"
    assert real.decode(ids_T[row.query_start : row.answer_start]) == "Question: the query?\nAnswer:"
    assert real.decode(ids_T[row.answer_start :]) == "  positive"
    candidates = split_candidates(row.candidate_ids_C, row.candidate_lengths_N)
    assert [real.decode(ids) for ids in candidates] == [f" {option}" for option in OPTIONS]
    assert candidates[row.gold].tolist() == ids_T[row.answer_start :].tolist()


def test_the_whole_text_has_the_same_tokens(real: Opened) -> None:
    """With the named templates, parts cut a plain text where the tokenizer would."""
    task = Task("t", "generation", ())
    rows = [Example((f"number {i} is a b",), f"word {i}", (), "f:1") for i in range(4)]
    for template in TEMPLATES.values():
        builder = EpisodeBuilder(real.ours, template, 250, Rejects())
        row = builder.build(DrawnEpisode("train", task, tuple(rows[:3]), rows[3], 0, 0))
        parts = [template.query_part(r.inputs[0]) + template.answer_part(r.output) for r in rows]
        assert row is not None and row.gold == -1 and not len(row.candidate_ids_C)
        (expected,) = real.ours.encode([template.separator.join(parts)])
        assert row.input_ids_T.tolist() == expected.tolist()


def test_sentencepiece_parts_stand_inside_a_text_and_a_bos_before_it(tmp_path: Path) -> None:
    folder = make_sentencepiece(tmp_path / "tokenizer")
    tokenizer = TextTokenizer(folder)
    assert tokenizer.prefix_ids.tolist() == [1]
    for template in (TEMPLATES["metaicl"], TEMPLATES["qa"], TEMPLATES["lama"]):
        builder = EpisodeBuilder(tokenizer, template, 250, Rejects())
        row = episode_of(builder, (0, 1))
        tail = template.query_part("the query?") + template.answer_part(" positive")
        decode = AutoTokenizer.from_pretrained(folder).decode
        assert decode(row.input_ids_T[row.demonstrations_M3[-1, 2] :]) == template.separator + tail
        assert row.input_ids_T[0] == 1 and row.demonstrations_M3[0, 0] == 1
        assert 1 not in row.input_ids_T[1:]
        alone = episode_of(builder, ())
        assert alone.input_ids_T.tolist() == [1, *row.input_ids_T[row.query_start :].tolist()]


def test_templates_say_what_is_wrong_with_them(tiny_model: Path) -> None:
    assert TEMPLATES["qa"].query_part("{output} {input}") == "Question: {output} {input}\nAnswer:"
    for text in ("{input}", "{output} {input}", "{input} {output}.", "{input}{input}{output}"):
        with pytest.raises(ValidationError, match=r"expected \{input\} once and \{output\} once"):
            EpisodeTemplate(demonstration=text, separator="\n")
    tokenizer = TextTokenizer(tiny_model)
    for separator in (" ", "\n "):
        template = EpisodeTemplate(demonstration="{input} {output}", separator=separator)
        with pytest.raises(ConfigError, match=r"joins .* use one that ends in a newline"):
            EpisodeBuilder(tokenizer, template, 100, Rejects())
    assert template_of("metaicl").separator == "\n\n\n"


def test_a_separator_has_tokens_where_the_tokenizer_drops_white_space(tmp_path: Path) -> None:
    """T5's does, and ends a text of its own with ``</s>``, which no part of an episode has."""
    save_t5_tokenizer(tmp_path)
    tokenizer = TextTokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"makes no token of '\\n\\n\\n': use a separator with"):
        EpisodeBuilder(tokenizer, TEMPLATES["metaicl"], 250, Rejects())
    template = EpisodeTemplate(demonstration="Question: {input}\nAnswer: {output}", separator=" ; ")
    builder = EpisodeBuilder(tokenizer, template, 250, Rejects())
    rows = [Example((f"number {i} is w{i}",), f"word {i}", (), "f:1") for i in range(4)]
    task = Task("t", "generation", ())
    row = builder.build(DrawnEpisode("train", task, tuple(rows[:3]), rows[3], 0, 0))
    parts = [template.query_part(r.inputs[0]) + template.answer_part(r.output) for r in rows]
    (expected,) = tokenizer.encode([template.separator.join(parts)])
    assert row is not None and row.input_ids_T.tolist() == expected.tolist()
    whole = AutoTokenizer.from_pretrained(tmp_path)(template.separator.join(parts))["input_ids"]
    assert whole == [*expected.tolist(), END]
    assert len(builder.separator_ids) == 2


class Lowercase:
    """A tokenizer folder that reads all text as lower case."""

    def __init__(self, folder: Path, tiny_model: Path) -> None:
        tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.save_pretrained(folder)
        self.folder = folder


def test_options_with_the_same_tokens_are_named(tmp_path: Path, tiny_model: Path) -> None:
    tokenizer = TextTokenizer(Lowercase(tmp_path, tiny_model).folder)
    builder = EpisodeBuilder(tokenizer, TEMPLATES["metaicl"], 100, Rejects())
    options = ("us", "them", "US")
    with pytest.raises(ConfigError, match="task 't': options 'us' and 'US' have the same tokens"):
        builder.candidate_ids(Task("t", "classification", (), options), options)


def inputs_in(row: Episode, tiny: Opened) -> list[str]:
    """Return the inputs of an episode's demonstrations and, last, of its query."""
    spans = [(int(a), int(b)) for a, b, _ in row.demonstrations_M3]
    spans.append((row.query_start, row.answer_start))
    return [tiny.decode(row.input_ids_T[a:b]).removesuffix("\n") for a, b in spans]


def test_partition_uses_every_example_at_most_once(
    tasks: Path, tiny_model: Path, tiny: Opened, tmp_path: Path
) -> None:
    stage = stage_for(
        tasks, tiny_model, draw="partition", demonstrations={"min": 2, "max": 4}, draws=3
    )
    rows = rows_of(stage, tmp_path / "work")
    train = [row for row in rows if row.split == "train"]
    used = [text for row in train for text in inputs_in(row, tiny)]
    assert len(used) == len(set(used)) and {row.draw for row in train} == {0}
    assert {len(row.demonstrations_M3) for row in train} <= {2, 3, 4}
    left = stage.prepare(tmp_path / "work").rejects.get("partition_remainder", 0)
    assert len(used) + left == 23 + 12 and left < 2 * 3
    assert {row.task for row in train} == {"first", "second"}
    assert Counter(row.draw for row in rows if row.split == "heldout") == {0: 6, 1: 6, 2: 6}


def test_resample_asks_every_example_and_never_shows_the_query(
    tasks: Path, tiny_model: Path, tiny: Opened, tmp_path: Path
) -> None:
    rows = rows_of(stage_for(tasks, tiny_model, draws=2, seed=1), tmp_path / "work")
    train = [inputs_in(row, tiny) for row in rows if row.split == "train"]
    assert Counter(query for *_, query in train) == {
        f"{name} number {i}": 2
        for name, count in (("first", 23), ("second", 12))
        for i in range(count)
    }
    assert all(len({*parts}) == 3 for parts in train)
    heldout = [inputs_in(row, tiny) for row in rows if row.split == "heldout"]
    shown = {text for *demonstrations, _ in heldout for text in demonstrations}
    asked = {query for *_, query in heldout}
    assert (len(shown), len(asked), len(heldout)) == (5, 6, 12) and not shown & asked
    by_query = Counter(row.query_id for row in rows)
    assert set(by_query.values()) == {2}


def test_demonstrations_are_spread_evenly(tmp_path: Path, tiny_model: Path, tiny: Opened) -> None:
    write_task(tmp_path / "tasks", "only", 12)
    stage = stage_for(tmp_path / "tasks", tiny_model, targets=[], draws=50)
    rows = rows_of(stage, tmp_path / "work")
    shown = Counter(text for row in rows for text in inputs_in(row, tiny)[:-1])
    expected = 2 * len(rows) / 12
    assert len(shown) == 12
    assert all(abs(count - expected) < 6 * np.sqrt(expected) for count in shown.values())


def test_distinct_labels_shows_other_labels_only(
    tasks: Path, tiny_model: Path, tmp_path: Path
) -> None:
    rows = rows_of(stage_for(tasks, tiny_model, distinct_labels=True), tmp_path / "work")
    for row in rows:
        answer = row.input_ids_T[row.answer_start :].tolist()
        shown = [row.input_ids_T[a:b].tolist() for _, a, b in row.demonstrations_M3]
        assert answer not in shown
    stage = stage_for(tasks, tiny_model, distinct_labels=True, demonstrations=5, support=5)
    line = refusal(stage, tmp_path / "other")
    assert "task 'target': found" in line and "whose label is not" in line and "needed 5" in line


def test_multitask_trains_on_the_support_of_its_targets(
    tasks: Path, tiny_model: Path, tiny: Opened, tmp_path: Path
) -> None:
    names = ["first", "second", "target"]
    stage = stage_for(tasks, tiny_model, paradigm="multitask", targets=names, queries_per_task=4)
    rows = rows_of(stage, tmp_path / "work")
    meta = rows_of(stage_for(tasks, tiny_model, targets=names, queries_per_task=4), tmp_path / "m")
    heldout = [row.sample_id for row in rows if row.split == "heldout"]
    assert heldout == [row.sample_id for row in meta] and len(heldout) == 12
    trained = {t for row in rows if row.split == "train" for t in inputs_in(row, tiny)}
    shown = {t for row in meta for t in inputs_in(row, tiny)[:-1]}
    asked = {inputs_in(row, tiny)[-1] for row in meta}
    assert shown <= trained and len(trained) == 15 and not trained & asked
    assert stage.prepare(tmp_path / "work").rejects == {
        "beyond_queries_per_task": 23 + 12 + 11 - 27
    }


def test_what_overlaps_a_target_is_not_trained_on(
    tasks: Path, tiny_model: Path, tiny: Opened, tmp_path: Path
) -> None:
    with (tasks / "first_16_13_train.tsv").open("a") as out:
        out.write("Target  NUMBER 3\tpositive\ntarget number 4\tpositive\n")
    with (tasks / "target_16_13_train.tsv").open("a") as out:
        out.write("".join(f"target number {i} \tneutral\n" for i in range(11)))
    stage = stage_for(tasks, tiny_model)
    rows = rows_of(stage, tmp_path / "work")
    trained = {t for row in rows if row.split == "train" for t in inputs_in(row, tiny)}
    assert len(trained) == 35 and not any("arget" in text for text in trained)
    heldout = [inputs_in(row, tiny) for row in rows if row.split == "heldout"]
    shown = {text.strip() for *demonstrations, _ in heldout for text in demonstrations}
    assert not shown & {query.strip() for *_, query in heldout}
    rejects = stage.prepare(tmp_path / "work").rejects
    assert rejects["overlaps_target"] == 2
    assert len(heldout) + rejects["overlaps_demonstration"] == 22 - 5


def stage_of_options(
    folder: Path, model: Path, examples: list[dict[str, Any]], **settings: Any
) -> EpisodesStage:
    """Episodes of one BIG-bench task, which is a target."""
    file = folder / "task.json"
    file.write_text(json.dumps({"name": "options", "examples": examples}))
    sources = [{"kind": "bigbench", "paths": [str(file)]}]
    return stage_for(folder, model, sources=sources, targets=["options"], **settings)


def test_questions_that_stand_in_their_options_are_told_apart(
    tiny_model: Path, tiny: Opened, tmp_path: Path
) -> None:
    """One input for all: 20 questions by their options, 10 more with answers of the first ten."""
    scores = [{f"this {i}": 1, f"that {i}": 0} for i in range(20)]
    scores += [{f"this {i}": 1, f"else {i}": 0} for i in range(10)]
    examples = [{"input": "Which is so?", "target_scores": score} for score in scores]
    stage = stage_of_options(tmp_path, tiny_model, examples)
    rows = rows_of(stage, tmp_path / "work")
    rejects = dict(stage.prepare(tmp_path / "work").rejects)
    assert len(rows) + rejects.pop("overlaps_demonstration") == 30 - 5 and not rejects
    assert len(rows) >= 20 - 5
    for row in rows:
        starts, ends = row.demonstrations_M3[:, 1], row.demonstrations_M3[:, 2]
        shown = {tiny.decode(row.input_ids_T[a:b]) for a, b in zip(starts, ends, strict=True)}
        assert tiny.decode(row.input_ids_T[row.answer_start :]) not in shown
    first = sum(int(row.gold == 0) for row in rows)
    assert 0.2 * len(rows) <= first <= 0.8 * len(rows)


def test_an_unusable_example_costs_its_own_episodes_alone(tmp_path: Path, tiny_model: Path) -> None:
    folder = Lowercase(tmp_path / "lower", tiny_model).folder
    examples = [
        {"input": f"q {i}", "target_scores": {f"a {i}": 1, f"{'A' if i == 3 else 'b'} {i}": 0}}
        for i in range(12)
    ]
    stage = stage_of_options(tmp_path, folder, examples, seed=1)
    rows = rows_of(stage, tmp_path / "work")
    rejects = stage.prepare(tmp_path / "work").rejects
    assert rejects == {"options_of_same_tokens": 1} and len(rows) == 12 - 5 - 1


def test_limits_keep_a_sample(tasks: Path, tiny_model: Path, tmp_path: Path) -> None:
    stage = stage_for(tasks, tiny_model, max_examples_per_task=8, queries_per_task=2)
    rows = rows_of(stage, tmp_path / "work")
    assert Counter((row.split, row.task) for row in rows) == {
        ("train", "first"): 8,
        ("train", "second"): 8,
        ("heldout", "target"): 2,
    }
    assert stage.prepare(tmp_path / "work").rejects == {
        "beyond_max_examples": 15 + 4 + 3,
        "beyond_queries_per_task": 1,
    }


def test_long_rows_lose_demonstrations_from_the_front(
    tasks: Path, tiny_model: Path, tmp_path: Path
) -> None:
    whole = {row.query_id: row for row in rows_of(stage_for(tasks, tiny_model), tmp_path / "a")}

    def num_tokens(row: Episode) -> int:
        num_answer = len(row.input_ids_T) - row.answer_start
        return row.answer_start + max(num_answer, int(row.candidate_lengths_N.max()))

    limit = int(np.median([num_tokens(row) for row in whole.values()]))
    stage = stage_for(tasks, tiny_model, max_length=limit)
    short = rows_of(stage, tmp_path / "b")
    dropped = 0
    for row in short:
        full = whole[row.query_id]
        assert num_tokens(row) <= limit
        kept = range(2 - len(row.demonstrations_M3), 2)
        expected = subset_input_ids(
            full.input_ids_T, full.demonstrations_M3, full.query_start, list(kept)
        )
        assert row.input_ids_T.tolist() == expected.tolist()
        assert (len(kept) == 2) == (num_tokens(full) <= limit)
        dropped += 2 - len(kept)
    rejects = stage.prepare(tmp_path / "b").rejects
    assert dropped and rejects["demonstrations_dropped"] == dropped and len(short) == len(whole)
    tiny = stage_for(tasks, tiny_model, max_length=12)
    assert "no episode could be made of 3 tasks (too_long 41)" in refusal(tiny, tmp_path / "c")


def test_equal_episodes_are_kept_once(tasks: Path, tiny_model: Path, tmp_path: Path) -> None:
    stage = stage_for(tasks, tiny_model, demonstrations=0, draws=3)
    rows = rows_of(stage, tmp_path / "work")
    assert len(rows) == 23 + 12 + 6 and len({row.sample_id for row in rows}) == len(rows)
    assert stage.prepare(tmp_path / "work").rejects == {"duplicate_episode": 2 * len(rows)}


def write_lama(folder: Path, **named: list[tuple[str, str]]) -> dict[str, Any]:
    folder.mkdir()
    for relation, pairs in named.items():
        lines = [json.dumps({"sub_label": a, "obj_label": b}) for a, b in pairs]
        (folder / f"{relation}.jsonl").write_text("\n".join(lines) + "\n")
    wordings = ("The {} of [X] is [Y] .", "[X]'s {}: [Y]", "[X] has the {} [Y].", "[Y] {} [X]")
    lines = [
        json.dumps({"relation": relation, "template": wording.format(relation)})
        for relation in named
        for wording in wordings
    ]
    (folder / "relations.jsonl").write_text("\n".join(lines) + "\n")
    template_file = str(folder / "relations.jsonl")
    return {"kind": "lama", "paths": [str(folder)], "templates": template_file}


def test_lama_episodes_have_one_template_each(
    tmp_path: Path, tiny_model: Path, tiny: Opened
) -> None:
    capital = [(f"Land {i}", f"City {i}") for i in range(12)]
    region = [(f"Land {i}", f"Part {i % 3}") for i in range(12)]
    lama = write_lama(tmp_path / "lama", capital=capital, region=region)
    stage = stage_for(
        tmp_path,
        tiny_model,
        sources=[lama | {"labels": "shared"}],
        targets=["region"],
        distinct_labels=True,
        draws=4,
        template="lama",
        demonstrations=1,
    )
    rows = rows_of(stage, tmp_path / "work")
    seen = set()
    for row in rows:
        shown, query = inputs_in(row, tiny)
        wordings = {
            "The" if t[:3] == "The" else "has" if "has" in t else ":" for t in (shown, query)
        }
        assert len(wordings) == 1
        seen |= wordings
        answer = tiny.decode(row.input_ids_T[row.answer_start :])
        assert answer[:6] in (" City ", " Part ")
        assert len(row.candidate_lengths_N) == 15
    assert seen == {"The", "has", ":"}
    assert stage.prepare(tmp_path / "work").rejects["template_not_usable"] == 2


def test_bigbench_tasks_are_never_trained_on(tasks: Path, tiny_model: Path, tmp_path: Path) -> None:
    examples = [
        {"input": f"Which is {i}?", "target_scores": {f"it is {i}": 1, "none": 0}} for i in range(9)
    ]
    path = tmp_path / "task.json"
    path.write_text(json.dumps({"name": "riddle", "examples": examples}))
    sources = [
        {"kind": "crossfit", "paths": [str(tasks)], "task_kind": "classification"},
        {"kind": "bigbench", "paths": [str(path)]},
    ]
    stage = stage_for(tasks, tiny_model, sources=sources, targets=["riddle"])
    riddles = [row for row in rows_of(stage, tmp_path / "work") if row.task == "riddle"]
    assert {(row.split, row.kind) for row in riddles} == {("heldout", "multiple_choice")}
    refused: tuple[dict[str, Any], ...] = (
        {"sources": sources, "targets": ["first"]},
        {"sources": sources[1:], "targets": ["riddle"], "paradigm": "multitask"},
    )
    for changes in refused:
        line = refusal(stage_for(tasks, tiny_model, **changes), tmp_path / "other")
        assert "task 'riddle' is from BIG-bench, which forbids training on it" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"targets": ["targte"]},
            "targets: there is no task 'targte'; there are: first, second, ta",
        ),
        (
            {"paradigm": "multitask"},
            "task 'first' is not in targets, and paradigm multitask has no",
        ),
        (
            {"support": 11},
            "target 'target' has 11 examples, expected at least 12: 11 that demonstr",
        ),
        (
            {"demonstrations": 12, "support": 12, "targets": []},
            "task 'second': found 11 examples to draw from, needed 12: give it more, or lower",
        ),
        (
            {"demonstrations": 12, "support": 12, "targets": [], "draw": "partition"},
            "task 'second': found 12 examples to draw from, needed 13",
        ),
        ({"max_length": 300}, "length: got 300, but the model in"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(
    changes: dict[str, Any], message: str, tasks: Path, tiny_model: Path, tmp_path: Path
) -> None:
    assert message in refusal(stage_for(tasks, tiny_model, **changes), tmp_path / "work")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"demonstrations": 6},
            "support is 5, but 6 demonstrations are drawn from it: expected at",
        ),
        (
            {"paradigm": "multitask", "demonstrations": 5},
            "5 demonstrations are drawn from it, beside the query: expected at least 6",
        ),
        ({"draw": "partition", "distinct_labels": True}, "it needs draw: resample"),
        ({"paradigm": "multitask", "targets": []}, "name them in 'targets'"),
        ({"targets": ["a", "a"]}, "targets names a task twice"),
        ({"demonstrations": {"min": 3, "max": 2}}, "max is 2, expected at least min"),
        ({"demonstrations": -1}, "demonstrations is -1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match=message):
        stage_for(tmp_path, tmp_path, **changes)


def test_prepared_twice_gives_equal_bytes_and_done_work_is_kept(
    tasks: Path, tiny_model: Path, tmp_path: Path
) -> None:
    stage = stage_for(tasks, tiny_model, draws=2)
    lines: list[str] = []
    prepared = stage.prepare(tmp_path / "a", on_progress=lines.append)
    assert lines == ["3 tasks, 46 examples", "81 episodes"]
    moved = tasks.rename(tmp_path / "moved")
    again = stage_for(moved, tiny_model, draws=2)
    moved_one = again.prepare(tmp_path / "b")
    assert (moved_one.shards, moved_one.rejects) == (prepared.shards, prepared.rejects)
    assert again.source_identity() == stage_for(moved, tiny_model).source_identity()
    files = [sorted((tmp_path / name / "episodes").iterdir()) for name in "ab"]
    assert len(files[0]) == len(prepared.shards)
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    stamps = [file.stat().st_mtime_ns for file in files[1]]
    assert again.prepare(tmp_path / "b") == moved_one
    assert [file.stat().st_mtime_ns for file in files[1]] == stamps
    splits = [shard.split for shard in prepared.shards]
    assert splits == sorted(splits, reverse=True)
    rows = [row.sample_id for row in rows_of(again, tmp_path / "b") if row.split == "train"]
    assert rows == sorted(rows)


def test_another_file_or_setting_starts_afresh(
    tasks: Path, tiny_model: Path, tmp_path: Path
) -> None:
    stage, work = stage_for(tasks, tiny_model), tmp_path / "work"
    before = {row.sample_id for row in rows_of(stage, work)}
    identity = stage.source_identity()
    write_task(tasks, "first", 24)
    assert stage.source_identity() != identity
    after = {row.sample_id for row in rows_of(stage, work)}
    assert len(after) == len(before) + 1
    other = {row.sample_id for row in rows_of(stage_for(tasks, tiny_model, seed=1), work)}
    assert len(other) == len(after) and len(other & after) < len(after) / 2
    with pytest.raises(StoreError, match="holds no complete episodes"):
        list(stage.read(tmp_path / "nothing", 0))


def test_the_order_of_files_and_other_tasks_moves_no_draw(
    tasks: Path, tiny_model: Path, tmp_path: Path
) -> None:
    stage = stage_for(tasks, tiny_model)
    rows = {row.sample_id for row in rows_of(stage, tmp_path / "a") if row.task != "second"}
    sources = [
        {
            "kind": "crossfit",
            "paths": [str(tasks / f"{name}_16_13_train.tsv") for name in ("target", "first")],
            "task_kind": "classification",
        }
    ]
    fewer = stage_for(tasks, tiny_model, sources=sources)
    assert {row.sample_id for row in rows_of(fewer, tmp_path / "b")} == rows


def test_planning_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'polars', 'tokenizers'}"
    code = f"import sys, stages.sources.episodes.stage; print({heavy} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
