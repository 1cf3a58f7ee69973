"""Preference pairs as ids: what each template makes of them, what is cut, and what is rejected.

Dimensions: T = tokens of a prompt.
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tokenizers import processors
from transformers import AutoTokenizer

from schemas.errors import ConfigError, StoreError
from schemas.sample_id import sample_id_of
from schemas.tables.preference_pairs import PREFERENCE_PAIRS, PreferencePair
from stages.sources.preference_pairs.stage import PreferencePairsStage
from tests.stages.sources.test_episodes import make_sentencepiece

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|channel|>", "<|message|>")


def template(start: str, turn: str, header: str) -> str:
    """Return a chat template: what stands before all turns, each turn, an assistant's header."""
    turns = "{% for m in messages %}" + turn + "{% endfor %}"
    return start + turns + "{% if add_generation_prompt %}" + header + "{% endif %}"


CHATML = template(
    "",
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}",
    "{{ '<|im_start|>assistant\n' }}",
)
TEMPLATES = {
    "chatml": CHATML,
    "bos and trim": template(
        "{{ bos_token }}",
        "{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}",
        "{{ '<|im_start|>assistant\n\n' }}",
    ),
    "eos closes": template(
        "", "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}", "{{ '<|assistant|>\n' }}"
    ),
    "channel": template(
        "",
        "{{ '<|im_start|>' + m.role + ('<|channel|>final' if m.role == 'assistant' else '')"
        " + '<|message|>' + m.content + '\n<|im_end|>' }}",
        "{{ '<|im_start|>assistant' }}",
    ),
    "no special token": template(
        "", "{{ '### ' + m.role + ':\n' + m.content + '\n---\n\n' }}", "{{ '### assistant:\n' }}"
    ),
}
CLOSED_BY = {"eos closes": "</s>", "no special token": "</s>"}


class Folders:
    """Tokenizer folders without a model: the tiny tokenizer with special tokens and a template."""

    def __init__(self, tiny_model: Path, root: Path) -> None:
        self.tiny_model = tiny_model
        self.root = root

    def make(self, chat: str | None, *, posts_bos: bool = True) -> Path:
        """Save a tokenizer; with ``posts_bos`` it puts a BOS before every text by itself."""
        folder = self.root / str(len(list(self.root.iterdir())))
        tokenizer: Any = AutoTokenizer.from_pretrained(self.tiny_model)
        tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
        tokenizer.add_tokens(list(SPECIAL), special_tokens=True)
        if posts_bos:
            bos = [("<s>", tokenizer.bos_token_id)]
            backend = tokenizer.backend_tokenizer
            backend.post_processor = processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A $B", special_tokens=bos
            )
        tokenizer.chat_template = chat
        tokenizer.save_pretrained(folder)
        return folder


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tiny_model, tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def chatml(folders: Folders) -> Path:
    return folders.make(CHATML)


Chat = list[dict[str, str]]


def chat(*texts: str, system: str = "") -> Chat:
    """Return a dialogue that begins with the user."""
    said = [("user", "assistant")[index % 2] for index in range(len(texts))]
    turns = [{"role": role, "content": text} for role, text in zip(said, texts, strict=True)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def record(prompt: object, chosen: object = "Good one.", rejected: object = "Bad one.") -> object:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def write(path: Path, records: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return str(path)


def stage_for(path: str, tokenizer: Path, **changes: Any) -> PreferencePairsStage:
    form = changes.pop("format", "standard")
    settings: dict[str, Any] = {
        "stage": "preference_pairs",
        "source": {"kind": "jsonl", "paths": [path], "format": form},
        "tokenizer": str(tokenizer),
        "max_prompt_length": 200,
        "max_response_length": 100,
        "heldout_fraction": 0.0,
        "rows_per_shard": 7,
    }
    return PreferencePairsStage.model_validate(settings | changes)


def rows_of(stage: PreferencePairsStage, work: Path) -> list[PreferencePair]:
    rows = []
    for index, shard in enumerate(stage.prepare(work).shards):
        of_shard = list(stage.read(work, index))
        assert {row.split for row in of_shard} == {shard.split} and len(of_shard) == shard.rows
        rows += of_shard
    return rows


class Make:
    """Makes rows of some records in a folder of this test's own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls = 0

    def stage(self, records: Sequence[object], tokenizer: Path, **changes: Any) -> Any:
        self.calls += 1
        path = write(self.root / f"pairs-{self.calls}.jsonl", records)
        return stage_for(path, tokenizer, **changes)

    def __call__(
        self, records: Sequence[object], tokenizer: Path, **changes: Any
    ) -> tuple[list[PreferencePair], dict[str, int]]:
        stage = self.stage(records, tokenizer, **changes)
        work = self.root / f"work-{self.calls}"
        return rows_of(stage, work), stage.prepare(work).rejects

    def refusal(self, records: Sequence[object], tokenizer: Path, **changes: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            self(records, tokenizer, **changes)
        assert "\n" not in str(caught.value)
        return str(caught.value)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return Make(tmp_path)


TURNS = ("What is it?", " A test.\n", "And 12 + 34?")
RESPONSES = ((" 46\n\nor so \n", "end"), ("final", "assistant"))


@pytest.mark.parametrize("responses", RESPONSES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_the_whole_dialogue_written_once(
    name: str, responses: tuple[str, str], folders: Folders, make: Make
) -> None:
    folder = folders.make(TEMPLATES[name])
    prompt = chat(*TURNS, system="Be brief.")
    (row,), rejects = make([record(prompt, *responses)], folder)
    library: Any = AutoTokenizer.from_pretrained(folder)
    end = library.convert_tokens_to_ids(CLOSED_BY.get(name, "<|im_end|>"))
    header = library.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert row.prompt_ids_T.tolist() == header and rejects == {}
    for text, ids_A in zip(responses, (row.chosen_ids_C, row.rejected_ids_R), strict=True):
        dialogue = [*prompt, {"role": "assistant", "content": text}]
        expected = library.apply_chat_template(dialogue, return_dict=False)
        if name == "no special token":
            cut = library("### assistant:\n" + text + "\n---", add_special_tokens=False).input_ids
            head = library("### assistant:\n", add_special_tokens=False).input_ids
            assert ids_A.tolist() == [*cut[len(head) :], end]
        else:
            after = library("\n", add_special_tokens=False).input_ids
            tail = after if name in ("chatml", "eos closes") else []
            assert [*header, *ids_A.tolist(), *tail] == expected
        assert ids_A[-1] == end and ids_A.tolist().count(end) == 1
    assert row.chosen_finished and row.rejected_finished


def test_a_bos_is_there_once_wherever_it_comes_from(folders: Folders, make: Make) -> None:
    records = [record("Who?")]
    for posts_bos in (True, False):
        folder = folders.make(TEMPLATES["bos and trim"], posts_bos=posts_bos)
        library: Any = AutoTokenizer.from_pretrained(folder)
        assert (library("a").input_ids[0] == library.bos_token_id) == posts_bos
        (row,), _ = make(records, folder)
        ids = [*row.prompt_ids_T, *row.chosen_ids_C, *row.rejected_ids_R]
        assert ids.index(library.bos_token_id) == 0 and ids.count(library.bos_token_id) == 1
        (row,), _ = make(records, folder, template="plain")
        ids = [*row.prompt_ids_T, *row.chosen_ids_C, *row.rejected_ids_R]
        assert ids.count(library.bos_token_id) == posts_bos
        assert library.decode(row.prompt_ids_T) == ("<s>Who?" if posts_bos else "Who?")
        (row,), _ = make(records, folders.make(CHATML, posts_bos=posts_bos))
        assert library.bos_token_id not in row.prompt_ids_T


def test_plain_is_the_texts_as_they_are_and_eos(folders: Folders, make: Make) -> None:
    folder = folders.make(None)
    library: Any = AutoTokenizer.from_pretrained(folder)
    (row,), _ = make([record("Q: a \n", " b\n", "c")], folder, template="plain")
    assert library.decode(row.prompt_ids_T) == "<s>Q: a \n"
    assert library.decode(row.chosen_ids_C) == " b\n</s>"
    assert library.decode(row.rejected_ids_R) == "c</s>"
    before = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?"
    said = [f"{before}\n\nAssistant: {text}" for text in ("So.", "No.")]
    pair = {"chosen": said[0], "rejected": said[1]}
    (row,), _ = make([pair], folder, template="plain", format="hh_rlhf")
    text = library.decode([*row.prompt_ids_T, *row.rejected_ids_R])
    assert text == f"<s>{said[1]}</s>"
    assert library.decode(row.prompt_ids_T).endswith("\n\nAssistant:")


def test_sentencepiece_responses_stand_inside_a_text(tmp_path: Path, make: Make) -> None:
    folder = make_sentencepiece(tmp_path / "sentencepiece")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template(
        "{{ bos_token }}", "{{ m.role + '\n' + m.content + eos_token }}", "{{ 'assistant\n' }}"
    )
    tokenizer.save_pretrained(folder)
    (row,), _ = make([record("Question", "number 1", "positive")], folder)
    assert tokenizer.decode(row.chosen_ids_C) == "number 1</s>"
    expected = tokenizer("a\npositive</s>", add_special_tokens=False).input_ids
    assert row.rejected_ids_R.tolist() == expected[-len(row.rejected_ids_R) :]
    assert row.prompt_ids_T.tolist().count(tokenizer.bos_token_id) == 1


def test_long_prompts_lose_whole_turns_from_the_front(chatml: Path, make: Make) -> None:
    long = chat("first " * 20, "yes", "second", "third", "fourth", system="System.")
    short = chat("second", "third", "fourth", system="System.")
    last = chat("fourth", system="System.")
    (expected,), _ = make([record(short)], chatml)
    (alone,), _ = make([record(last)], chatml)
    room = len(expected.prompt_ids_T)
    rows, rejects = make([record(long)], chatml, max_prompt_length=room)
    assert [row.sample_id for row in rows] == [expected.sample_id]
    assert rejects == {"turns_dropped": 2}
    for length in (room - 1, len(alone.prompt_ids_T)):
        rows, rejects = make([record(long)], chatml, max_prompt_length=length)
        assert [row.sample_id for row in rows] == [alone.sample_id]
        assert rejects == {"turns_dropped": 4}
    line = make.refusal([record(long)], chatml, max_prompt_length=len(alone.prompt_ids_T) - 1)
    assert "no train row is left of the preference pairs (prompt_too_long 1); give more" in line


def test_long_responses_cost_their_row_or_their_end(chatml: Path, make: Make) -> None:
    records = [record("Q", "a b c d e f g", "a")]
    (whole,), rejects = make(records, chatml)
    length = len(whole.chosen_ids_C)
    (row,), rejects = make(records, chatml, max_response_length=length)
    assert row.sample_id == whole.sample_id and rejects == {}
    kept = record("R", "a", "b")
    rows, rejects = make([*records, kept], chatml, max_response_length=length - 1)
    assert len(rows) == 1 and rejects == {"response_too_long": 1}
    cut = {"max_response_length": length - 1, "long_responses": "truncate"}
    (row,), rejects = make(records, chatml, **cut)
    assert row.chosen_ids_C.tolist() == whole.chosen_ids_C[:-1].tolist()
    assert row.rejected_ids_R.tolist() == whole.rejected_ids_R.tolist()
    assert (row.chosen_finished, row.rejected_finished) == (False, True)
    assert rejects == {"responses_truncated": 1}
    same = record("Q", "a b c d e f g", "a b c d e f h")
    rows, rejects = make([same, kept], chatml, **(cut | {"max_response_length": 3}))
    assert len(rows) == 1 and rejects == {"same_response": 1}


KEPT = record("The one that is kept.")
ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record("q", "a", " \n"), "empty_response"),
        (record("q", "", "b"), "empty_response"),
        (record(" \n", "a", "b"), "empty_prompt"),
        (record("q", "a", "a"), "same_response"),
        (record("q", chat("p", "a"), chat("q", "b")), "prompts_differ"),
        (record("q", chat("q", "a"), "b"), ""),
        (record([ANSWER], "a", "b"), "no_user_turn"),
        (record([{"role": "system", "content": "s"}], "a", "b"), "no_user_turn"),
        (record(chat("q", "a"), "a", "b"), "bad_roles"),
        (record([ANSWER, *chat("q")], "a", "b"), "bad_roles"),
        (record([*chat("q"), *chat("q")], "a", "b"), "bad_roles"),
        (record([*chat("q"), {"role": "tool", "content": "3"}], "a", "b"), "bad_roles"),
        (record([*chat("q"), *chat("p", "x", "y", system="s")], "a", "b"), "bad_roles"),
        (record("q", chat("q", "a", "p"), chat("q", "a", "r")), "bad_roles"),
        (record("q <|im_end|>", "a", "b"), "special_token_in_text"),
        (record("q", "a<|im_end|>\n<|im_start|>user", "b"), "special_token_in_text"),
        (record("q", "a", "b</s>"), "special_token_in_text"),
        (record(chat("q", system="<|endoftext|>"), "a", "b"), "special_token_in_text"),
        (record("q", "a <|im_end|", "b < s >"), ""),
    ],
)
def test_what_cannot_be_a_row_is_counted_by_reason(
    bad: object, reason: str, chatml: Path, make: Make
) -> None:
    (only,), _ = make([KEPT], chatml)
    rows, rejects = make([bad, KEPT], chatml)
    assert rejects == ({reason: 1} if reason else {})
    assert len(rows) == (1 if reason else 2) and only.sample_id in {row.sample_id for row in rows}


def test_equal_rows_are_one(chatml: Path, make: Make) -> None:
    rows, rejects = make([KEPT, record("q"), KEPT, KEPT, record("q", "Bad one.", "a")], chatml)
    assert len(rows) == 3 and rejects == {"duplicate_pair": 2}


def test_ids_beyond_the_model_are_rejected(folders: Folders, make: Make) -> None:
    folder = folders.make(TEMPLATES["no special token"])
    size = len(AutoTokenizer.from_pretrained(folder))
    (folder / "config.json").write_text(json.dumps({"vocab_size": size}))
    (row,), _ = make([record("q")], folder)
    eos_id = int(row.chosen_ids_C[-1])
    (folder / "config.json").write_text(json.dumps({"vocab_size": eos_id}))
    line = make.refusal([record("q")], folder)
    assert "no train row is left of the preference pairs (token_outside_vocabulary 1)" in line
    (folder / "config.json").write_text(json.dumps({"vocab_size": eos_id + 1}))
    assert len(make([record("q")], folder)[0]) == 1


def test_a_template_may_refuse_or_rewrite_a_row(folders: Folders, make: Make) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('No\nsystem') }}{% endif %}"
    picky = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    folder = folders.make(strict + picky)
    records = [
        record(chat("q", system="s")),
        record("q", "why</think>so", "no</think> and yes"),
        record("q", "so", "yes"),
    ]
    rows, rejects = make(records, folder)
    assert len(rows) == 1 and rejects == {"refused_by_template": 1, "changed_by_template": 1}


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (None, "has no chat template; save one there as chat_template.jinja, or use template: pla"),
        ("{{ raise_exception('Never') }}", "cannot write a question and its answer: Never; repair"),
        ("{% for m in %}", "cannot write a question and its answer: Expected an expression"),
        (
            template("", "{{ m.role + m.content + eos_token }}", "{{ 'Assistant' }}"),
            "is left of the preference pairs (not_after_header 1); the chat template in",
        ),
    ],
)
def test_templates_that_cannot_serve(
    chat_template: str | None, message: str, folders: Folders, make: Make
) -> None:
    folder = folders.make(chat_template)
    line = make.refusal([record("q")], folder)
    assert message in line and str(folder) in line


def test_settings_that_do_not_fit_the_model(
    chatml: Path, tiny_model: Path, folders: Folders, make: Make
) -> None:
    assert (
        f"max_prompt_length + max_response_length: got 300, but the model in {tiny_model} takes at "
        f"most 256 tokens" in make.refusal([record("q")], tiny_model, template="plain")
    )
    dialogue = record(chat("q", "a", "p"))
    rows, rejects = make([record("q"), dialogue], chatml, template="plain")
    assert len(rows) == 1 and rejects == {"several_messages": 1}
    line = make.refusal([dialogue], chatml, template="plain")
    assert line.endswith("template: plain takes prompts that are one text; use template: chat")
    folder = folders.make(CHATML)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    assert len(make([record("q")], folder)[0]) == 1
    line = make.refusal([record("q")], folder, template="plain")
    assert f"the tokenizer in {folder} has no end-of-sequence token; set its eos_token" in line
    line = make.refusal([record("q", "a", "a")], chatml, heldout_fraction=0.5)
    assert "no train row is left of the preference pairs (same_response 1); give more pairs" in line
    with pytest.raises(ValidationError, match="max_response_length"):
        make.stage([], chatml, max_response_length=0)


def test_a_template_that_prints_the_date_prints_one(folders: Folders, make: Make) -> None:
    dated = "{{ 'Today is ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML
    folder = folders.make(dated)
    (row,), _ = make([record("q")], folder)
    text = AutoTokenizer.from_pretrained(folder).decode(row.prompt_ids_T)
    assert text.startswith("Today is 26 Jul 2024\n<|im_start|>user\nq<|im_end|>")


def many(count: int) -> list[object]:
    """Return pairs of which each prompt has two, the second spelled another way."""
    spell: list[Callable[[str], str]] = [str, lambda text: f"  {text.upper()}"]
    return [
        record(spell[index % 2](f"Question {index // 2}"), f"right {index}", f"wrong {index}")
        for index in range(count)
    ]


def test_a_prompt_is_on_one_side_and_rows_come_in_a_fixed_shuffle(chatml: Path, make: Make) -> None:
    records = many(160)
    rows, _ = make(records, chatml, heldout_fraction=0.25)
    library: Any = AutoTokenizer.from_pretrained(chatml)
    sides: dict[str, set[str]] = {}
    for row in rows:
        question = library.decode(row.prompt_ids_T).split("\n")[1].strip().lower()
        sides.setdefault(question, set()).add(row.split)
    assert len(sides) == 80 and all(len(side) == 1 for side in sides.values())
    counts = Counter(row.split for row in rows)
    assert abs(counts["heldout"] - 40) < 25 and sum(counts.values()) == 160
    ids = [(row.split == "heldout", row.sample_id) for row in rows]
    assert ids == sorted(ids)
    again, _ = make(records[::-1], chatml, heldout_fraction=0.25)
    assert [row.sample_id for row in again] == [row.sample_id for row in rows]
    more, _ = make(many(200), chatml, heldout_fraction=0.25)
    split = {row.sample_id: row.split for row in more}
    assert all(split[row.sample_id] == row.split for row in rows)
    few, rejects = make(records, chatml, heldout_fraction=0.25, max_rows=40)
    kept = Counter(row.split for row in few)
    assert kept["heldout"] == counts["heldout"] * 40 // 160
    assert rejects == {"beyond_max_rows": 160 - len(few)} and 39 <= len(few) <= 40
    train = [row.sample_id for row in rows if row.split == "train"]
    assert [row.sample_id for row in few if row.split == "train"] == train[: kept["train"]]


def test_prompts_cut_to_the_same_turns_are_on_one_side(chatml: Path, make: Make) -> None:
    records = [
        record(chat(f"{index} " * 60, "yes", "What then?"), f"a {index}", "b")
        for index in range(30)
    ]
    rows, rejects = make(records, chatml, max_prompt_length=60)
    assert len(rows) == 30 and rejects == {"turns_dropped": 60}
    assert len({tuple(row.prompt_ids_T.tolist()) for row in rows}) == 1
    line = make.refusal(records, chatml, max_prompt_length=60, heldout_fraction=0.5)
    assert "row is left of the preference pairs (turns_dropped 60)" in line


def test_a_row_is_named_by_its_ids_and_where_they_part(chatml: Path, make: Make) -> None:
    (row,), _ = make([record("q")], chatml)
    parts = (row.prompt_ids_T, row.chosen_ids_C, row.rejected_ids_R)
    t, c, r = map(len, parts)
    spans = [(0, t), (t, t + c), (t + c, t + c + r)]
    assert row.sample_id == sample_id_of(np.concatenate(parts), spans)


def test_prepared_twice_gives_equal_bytes_and_done_work_is_kept(
    chatml: Path, tmp_path: Path, make: Make
) -> None:
    stage = make.stage(many(20), chatml, heldout_fraction=0.3)
    lines: list[str] = []
    prepared = stage.prepare(tmp_path / "a", on_progress=lines.append)
    assert lines == ["20 preference pairs"] and stage.table is PREFERENCE_PAIRS
    assert stage.prepare(tmp_path / "b") == prepared
    files = [sorted((tmp_path / name / "preference_pairs").iterdir()) for name in "ab"]
    assert len(files[0]) == len(prepared.shards) > 2
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    stamps = [file.stat().st_mtime_ns for file in files[1]]
    assert stage.prepare(tmp_path / "b") == prepared
    assert [file.stat().st_mtime_ns for file in files[1]] == stamps
    with pytest.raises(StoreError, match="holds no complete preference_pairs"):
        list(stage.read(tmp_path / "nothing", 0))


def test_another_file_setting_or_template_starts_afresh(
    folders: Folders, tmp_path: Path, make: Make
) -> None:
    folder, work = folders.make(CHATML), tmp_path / "work"
    stage = make.stage(many(20), folder)
    before = {row.sample_id for row in rows_of(stage, work)}
    write(Path(stage.source.paths[0]), many(21))
    assert len(rows_of(stage, work)) == 21
    (folder / "chat_template.jinja").write_text(CHATML.replace("<|im_start|>", "<|im_start|> "))
    after = {row.sample_id for row in rows_of(stage, work)}
    assert len(after) == 21 and not after & before
    fewer = stage.model_copy(update={"max_rows": 5})
    assert len(rows_of(fewer, work)) == 5


def test_planning_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'polars', 'tokenizers'}"
    code = f"import sys, stages.sources.preference_pairs.stage; print({heavy} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@pytest.mark.slow
def test_real_pairs_keep_their_turns_and_end_them_once(smollm2: Path, tmp_path: Path) -> None:
    path = smollm2.parent.parent / "pairs" / "dpo_en_demo.jsonl"
    if not path.is_file():
        pytest.fail(f"{path} is missing: run `make pairs`")
    changes = {"max_prompt_length": 192, "max_response_length": 96, "heldout_fraction": 0.2}
    stage = stage_for(str(path), smollm2, format="sharegpt", long_responses="truncate", **changes)
    rows = rows_of(stage, tmp_path / "work")
    library: Any = AutoTokenizer.from_pretrained(smollm2)
    start, end = library.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    said = {message["value"] for line in path.open() for message in read_messages(line)}
    for row in rows:
        text = library.decode(row.prompt_ids_T)
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert text.split("<|im_start|>")[2].startswith("user\n")
        assert row.prompt_ids_T.tolist().count(start) == text.count("<|im_start|>")
        for ids_A, finished in (
            (row.chosen_ids_C, row.chosen_finished),
            (row.rejected_ids_R, row.rejected_finished),
        ):
            assert ids_A.tolist().count(end) == finished and start not in ids_A
            assert not finished or ids_A[-1] == end
            assert not finished or library.decode(ids_A[:-1]) in said
            assert finished or len(ids_A) == 96
    assert len(rows) > 200


def read_messages(line: str) -> list[dict[str, str]]:
    body = json.loads(line)
    return [*body["conversations"], body["chosen"], body["rejected"]]
