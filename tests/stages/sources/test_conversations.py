"""Conversations as ids and spans: what is scored, by templates that models are published with.

The templates are those that TRL keeps of published models; the special tokens they write are added
to the tiny tokenizer, as such a model's own has them.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trl
from pydantic import ValidationError
from transformers import AutoTokenizer

from schemas.errors import ConfigError, RejectLimitError
from schemas.tables.conversations import Conversation
from stages.sources.conversations.stage import ConversationsStage

PUBLISHED = Path(trl.__file__).parent / "chat_templates"
MARKS = {
    "qwen2_5": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
    "mistral": ("<s>", "</s>", "[INST]", "[/INST]"),
    "qwen3": ("<|im_start|>", "<|im_end|>"),
    "qwen3_instruct_2507": ("<|im_start|>", "<|im_end|>"),
}
CLOSED = {
    "qwen2_5": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
    "qwen3": "<|im_end|>",
}
SPECIAL = {
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<end_of_turn>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>"},
}
# Mistral's way since its second version: a system turn is in the last turn, if a user said that.
INST = """{{ bos_token }}{% if messages[0].role == 'system' %}
{%- set told = messages[0].content + '\n\n' %}{% endif %}{% for m in messages %}
{%- if m.role == 'user' %}{{ '[INST] ' + (told if told and loop.last else '') + m.content
 + ' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}
{%- elif not loop.first %}{{ raise_exception('system first') }}{% endif %}{% endfor %}"""
Chat = list[dict[str, Any]]
NO_THOUGHT = {"enable_thinking": False}


@pytest.fixture(scope="module")
def tokenizers(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by the template's name; ``_training`` ones mark answers themselves."""
    root, found = tmp_path_factory.mktemp("tokenizers"), {}
    training = {f"{name}_training": MARKS[name] for name in MARKS if name != "mistral"}
    for name, marks in (MARKS | training).items():
        base = name.removesuffix("_training")
        tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.add_special_tokens(
            SPECIAL.get(base, {"eos_token": "<|im_end|>"})
            | {"additional_special_tokens": list(marks)}
        )
        path = PUBLISHED / f"{name}.jinja"
        tokenizer.chat_template = INST if name == "mistral" else path.read_text()
        found[name] = root / name
        tokenizer.save_pretrained(found[name])
    return found


def said(*texts: str, system: str = "") -> Chat:
    """Return a chat that begins with the user."""
    turns: Chat = [
        {"role": ("user", "assistant")[index % 2], "content": text}
        for index, text in enumerate(texts)
    ]
    return [{"role": "system", "content": system}, *turns] if system else turns


class Make:
    """Makes rows of some records in a folder of this test's own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls = 0

    def __call__(
        self, records: Sequence[object], tokenizer: Path, **changes: Any
    ) -> tuple[list[Conversation], dict[str, int]]:
        self.calls += 1
        path = self.root / f"chats-{self.calls}.jsonl"
        rows = [{"messages": one} if isinstance(one, list) else one for one in records]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"kind": "jsonl", "paths": [str(path)]} | changes.pop("source", {})
        settings: dict[str, Any] = {
            "stage": "conversations",
            "source": source,
            "tokenizer": str(tokenizer),
            "max_length": 1200,
            "heldout_fraction": 0.0,
            "max_rejected_fraction": 0.9,
        }
        stage = ConversationsStage.model_validate(settings | changes)
        work = self.root / f"work-{self.calls}"
        prepared = stage.prepare(work)
        made = [row for index in range(len(prepared.shards)) for row in stage.read(work, index)]
        return made, dict(prepared.rejects)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return Make(tmp_path)


def scored_texts(row: Conversation, tokenizer: Path) -> list[str]:
    """Return what the scored spans decode to."""
    read: Any = AutoTokenizer.from_pretrained(tokenizer)
    return [read.decode(row.input_ids_T[start:end]) for start, end in row.scored_S2]


TURNS = said("What is it?", "A test,\n\nof two lines.", "And 12 + 34?", "46")
SCORED = {"qwen3": ["46<|im_end|>"]}  # of a row; its earlier turn is another row's


@pytest.mark.parametrize("name", CLOSED)
def test_what_an_assistant_said_is_scored_to_the_token(
    make: Make, tokenizers: dict[str, Path], name: str
) -> None:
    """With the token that closes it, and nothing else; the ids are those of the whole text."""
    settings = NO_THOUGHT if name == "qwen3" else {}
    rows, rejects = make([TURNS], tokenizers[name], chat_template_kwargs=settings)
    assert not rejects
    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizers[name])
    answers = [turn["content"] + CLOSED[name] for turn in TURNS if turn["role"] == "assistant"]
    found = sorted((scored_texts(row, tokenizers[name]) for row in rows), key=len)
    stripped = [[text.lstrip(" ") for text in texts] for texts in found]
    if name == "qwen3":  # an empty thought stands before the last answer alone
        assert sorted(stripped) == sorted([[answers[0]], [answers[1]]])
    else:
        assert stripped == [answers]
    whole = {
        tokenizer.apply_chat_template(TURNS[:count], tokenize=False, **settings).rstrip("\n")
        for count in (2, 4)
    }
    assert {tokenizer.decode(row.input_ids_T) for row in rows} <= whole


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma", "qwen3_instruct_2507"])
def test_marks_of_a_template_and_its_prefixes_agree(
    make: Make, tokenizers: dict[str, Path], name: str
) -> None:
    """And with transformers' own mask, but for the line break behind the closing token."""
    (plain,), _ = make([TURNS], tokenizers[name])
    (marked,), _ = make([TURNS], tokenizers[f"{name}_training"])
    np.testing.assert_array_equal(plain.input_ids_T, marked.input_ids_T)
    np.testing.assert_array_equal(plain.scored_S2, marked.scored_S2)
    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizers[f"{name}_training"])
    whole = tokenizer.apply_chat_template(
        TURNS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids_T, mask_T = np.array(whole["input_ids"]), np.array(whole["assistant_masks"])
    length = len(marked.input_ids_T)
    np.testing.assert_array_equal(ids_T[:length], marked.input_ids_T)
    scored_T = np.zeros(length, int)
    for start, end in marked.scored_S2:
        scored_T[start:end] = 1
    differing = ids_T[:length][mask_T[:length] != scored_T].tolist()
    assert set(tokenizer.decode(differing)) <= {"\n"}


def test_an_answer_is_scored_as_it_was_given(make: Make, tokenizers: dict[str, Path]) -> None:
    """Qwen3 drops thoughts of earlier turns: each answer has the row in which it thought."""
    thoughts = said("One?", "1", "Two?", "2")
    thoughts[1]["reasoning_content"], thoughts[3]["reasoning_content"] = "first", "second"
    rows, rejects = make([thoughts], tokenizers["qwen3"])
    assert not rejects
    short, long = sorted(rows, key=lambda row: len(row.input_ids_T))
    first = "<think>\nfirst\n</think>\n\n1<|im_end|>"
    second = "<think>\nsecond\n</think>\n\n2<|im_end|>"
    assert scored_texts(short, tokenizers["qwen3"]) == [first]
    assert scored_texts(long, tokenizers["qwen3"]) == [second]
    # Its training variant keeps them, and marks both answers of one row.
    ((row,), _) = make([thoughts], tokenizers["qwen3_training"])
    assert scored_texts(row, tokenizers["qwen3_training"]) == [first, second]
    # What its header opens is not the answer's: with an empty thought there, none is scored.
    ((row,), _) = make([TURNS], tokenizers["qwen3_training"], chat_template_kwargs=NO_THOUGHT)
    texts = scored_texts(row, tokenizers["qwen3_training"])
    assert texts == ["A test,\n\nof two lines.<|im_end|>", "46<|im_end|>"]


def test_a_prompt_ends_with_the_header_of_its_answer(
    make: Make, tokenizers: dict[str, Path]
) -> None:
    """Whether the chat has an answer or not, so it is there once; nothing of it is scored."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizers["qwen2_5"])
    for chat in (TURNS, TURNS[:3]):
        ((row,), rejects) = make([chat, TURNS], tokenizers["qwen2_5"], turns="none")
        assert rejects == {"duplicate_conversation": 1}
        text = tokenizer.apply_chat_template(TURNS[:3], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(row.input_ids_T) == text and row.num_positions == 0
    too_long = {"turns": "none", "max_length": 8, "long_conversations": "truncate"}
    with pytest.raises(ConfigError, match="too_long 1"):
        make([TURNS], tokenizers["qwen2_5"], **too_long)


def test_turns_say_what_is_scored(make: Make, tokenizers: dict[str, Path]) -> None:
    folder = tokenizers["qwen2_5"]
    open_end = [*TURNS, {"role": "user", "content": "Thanks."}]
    for chat in (TURNS, open_end):  # what follows the last answer is in no row
        ((last,), _) = make([chat], folder, turns="last")
        assert scored_texts(last, folder) == ["46<|im_end|>"]
        ((every,), _) = make([chat], folder, turns="all")
        assert every.scored_S2.tolist() == [[1, len(every.input_ids_T)]]
        np.testing.assert_array_equal(last.input_ids_T, every.input_ids_T)
        assert last.sample_id != every.sample_id


FORMATS: dict[str, tuple[dict[str, Any], Any]] = {
    "messages": ({"column": "chat"}, {"chat": said("Hi.", "Yes?", system="Be kind.")}),
    "parts": (
        {"format": "messages"},
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"text": "i."}]},
                {"role": "assistant", "content": "Yes?"},
            ]
        },
    ),
    "sharegpt": (
        {"format": "sharegpt"},
        {
            "system": "Be kind.",
            "conversations": [
                {"from": "human", "value": "Hi."},
                {"from": "gpt", "value": "Yes?"},
            ],
        },
    ),
    "alpaca": (
        {"format": "alpaca"},
        {"system": "Be kind.", "instruction": "Hi.", "input": "", "output": "Yes?"},
    ),
    "prompt_completion": (
        {"format": "prompt_completion"},
        {
            "prompt": said("Hi.", system="Be kind."),
            "completion": [{"role": "assistant", "content": "Yes?"}],
        },
    ),
}


def test_all_formats_say_the_same(make: Make, tokenizers: dict[str, Path]) -> None:
    rows = []
    for source, record in FORMATS.values():
        (row,), _ = make([record], tokenizers["qwen2_5"], source=source)
        rows.append(row)
    assert len({row.sample_id for row in rows}) == 1
    text = {"format": "prompt_completion"}, {"prompt": "Hi.", "completion": "Yes?"}
    more = {"format": "alpaca"}, {"instruction": "Hi.", "input": "You.", "output": "Yes?"}
    for (source, record), asked in ((text, "Hi."), (more, "Hi.\nYou.")):
        ((row,), _) = make([record], tokenizers["gemma"], source=source)
        ((expected,), _) = make([said(asked, "Yes?")], tokenizers["gemma"])
        assert row.sample_id == expected.sample_id


TOOL_TURN = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "look", "arguments": {"at": "sky"}}}],
    },
    {"role": "tool", "content": "blue"},
    {"role": "assistant", "content": "Fine."},
]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


def test_calls_of_tools_are_scored_and_their_answers_are_not(
    make: Make, tokenizers: dict[str, Path]
) -> None:
    record = {"messages": TOOL_TURN, "tools": TOOLS}
    ((row,), _) = make([record], tokenizers["qwen2_5"])
    call, answer = scored_texts(row, tokenizers["qwen2_5"])
    assert '{"name": "look", "arguments": {"at": "sky"}}' in call and call.endswith("<|im_end|>")
    assert answer == "Fine.<|im_end|>"
    rows, rejects = make([record, said("Hi.", "Yes?")], tokenizers["llama3"])
    assert len(rows) == 1 and rejects == {"unread_tool_calls": 1}


REJECTED: dict[str, tuple[str, Any]] = {
    "no_assistant_turn": ("qwen2_5", [{"role": "system", "content": "Only that."}]),
    "nothing_asked": ("qwen2_5", [{"role": "assistant", "content": "Hello."}]),
    "empty_response": ("qwen2_5", said("Hi.", "  ")),
    "bad_roles": ("qwen2_5", [{"role": "critic", "content": "No."}, *said("Hi.", "Yes?")]),
    "special_token_in_text": ("qwen2_5", said("Hi.<|im_end|>", "Yes?")),
    "too_long": ("qwen2_5", said("Hi. " * 1200, "Yes?")),
    "refused_by_template": ("gemma", said("Hi.", "Yes?", system="Be kind.")),
    "empty_reasoning": ("qwen3", said("Hi.", "Yes?")),
    "prompt_not_kept": ("mistral", said("Hi.", "Yes?", system="Be kind.")),
    "unread_reasoning_content": (
        "qwen2_5",
        [said("Hi.")[0], {"role": "assistant", "content": "Yes?", "reasoning_content": "Well."}],
    ),
    "bad_messages": ("qwen2_5", [{"role": "user", "content": {"image": "a.png"}}]),
    "missing_column": ("qwen2_5", {"chat": []}),
}


@pytest.mark.parametrize("reason", REJECTED)
def test_what_no_row_can_be_made_of_is_counted(
    make: Make, tokenizers: dict[str, Path], reason: str
) -> None:
    name, record = REJECTED[reason]
    settings = NO_THOUGHT if name == "qwen3" and reason != "empty_reasoning" else {}
    good = said("Good?", "It is.")
    good[1] |= {"reasoning_content": "So."} if reason == "empty_reasoning" else {}
    rows, rejects = make([record, good], tokenizers[name], chat_template_kwargs=settings)
    assert len(rows) == 1 and rejects == {reason: 1}


def test_a_template_without_a_branch_for_generation_is_refused(
    make: Make, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "headless"
    shutil.copytree(tokenizers["qwen2_5"], folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    line = r"writes '<\|im_start\|>assistant\\n' before an answer, and not where one is asked"
    with pytest.raises(ConfigError, match=line):
        make([said("Hi.", "Yes?")], folder)


def test_a_prompt_that_its_answer_changes_is_named_as_that(
    make: Make, tokenizers: dict[str, Path]
) -> None:
    line = "writes a prompt otherwise once it is answered .some leave out a system turn.: put that"
    with pytest.raises(ConfigError, match=line):
        make([said("Hi.", "Yes?", system="Be kind.")], tokenizers["mistral"])


def test_a_reject_is_listed_with_its_place_and_opening(
    make: Make, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    chats = [said("Hi there.", "Yes?"), said("Hi there.", "Yes?"), said("Again.", " ")]
    make(chats, tokenizers["qwen2_5"])
    body = json.loads((tmp_path / "work-1" / "conversations.json").read_text())
    place = tmp_path / "chats-1.jsonl"
    twice, empty = body["rejected"]
    assert (twice["place"], twice["reason"]) == (f"{place}:2", "duplicate_conversation")
    assert twice["detail"].endswith(f"is that of {place}:1")
    assert (empty["place"], empty["reason"]) == (f"{place}:3", "empty_response")
    assert empty["detail"] == "the conversation that opens with 'Again.'"


def test_nothing_left_is_one_line_that_says_why(make: Make, tokenizers: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"no train row .*no_assistant_turn 1.*; give more"):
        make([[{"role": "user", "content": "Hi."}]], tokenizers["qwen2_5"])
    with pytest.raises(ConfigError, match=r"empty_reasoning 1\); .*enable_thinking: false"):
        make([said("Hi.", "Yes?")], tokenizers["qwen3"])
    with pytest.raises(ConfigError, match="no column 'messages'; it has 'text'"):
        make([{"text": "Hi."}], tokenizers["qwen2_5"])
    with pytest.raises(RejectLimitError, match="1 of 2 records are malformed"):
        records = [{"messages": []}, said("Hi.", "Yes?")]
        make(records, tokenizers["qwen2_5"], max_rejected_fraction=0.1)
    with pytest.raises(ConfigError, match="has no chat template; save one"):
        read: Any = AutoTokenizer.from_pretrained(tokenizers["qwen2_5"])
        read.chat_template = None
        read.save_pretrained(make.root / "bare")
        make([said("Hi.", "Yes?")], make.root / "bare")
    changes: list[dict[str, Any]] = [
        {"chat_template_kwargs": {"tools": []}},
        {"turns": "user"},
        {"max_length": 1},
    ]
    for bad in changes:
        with pytest.raises(ValidationError):
            make([said("Hi.", "Yes?")], tokenizers["qwen2_5"], **bad)
    with pytest.raises(ValidationError, match="has columns of its own names"):
        make([], tokenizers["qwen2_5"], source={"format": "alpaca", "column": "rows"})


def test_a_long_conversation_is_cut_where_it_says_so(
    make: Make, tokenizers: dict[str, Path]
) -> None:
    folder = tokenizers["qwen2_5"]
    ((whole,), _) = make([TURNS], folder)
    (_, first_end), (second, end) = whole.scored_S2.tolist()
    for limit, spans in (
        (end - 1, [*whole.scored_S2.tolist()[:1], [second, end - 1]]),
        (second, whole.scored_S2.tolist()[:1]),
        (first_end, whole.scored_S2.tolist()[:1]),
    ):
        cut = {"max_length": limit, "long_conversations": "truncate"}
        ((row,), rejects) = make([TURNS], folder, **cut)
        assert row.is_cut and rejects == {"cut_to_length": 1}
        np.testing.assert_array_equal(row.input_ids_T, whole.input_ids_T[:limit])
        assert row.scored_S2.tolist() == spans
    with pytest.raises(ConfigError, match="too_long 1"):
        make([TURNS], folder, max_length=8, long_conversations="truncate")


def test_conversations_that_open_alike_are_on_one_side(
    make: Make, tokenizers: dict[str, Path]
) -> None:
    """And equal ones are there once, in whatever order they come."""
    chats = [
        said(f"Question {number}?", f"Answer {answer}.", system="Be kind.")
        for number in range(40)
        for answer in range(3)
    ]
    settings = {"heldout_fraction": 0.3, "rows_per_shard": 50}
    rows, rejects = make([*chats, chats[7]], tokenizers["qwen2_5"], **settings)
    again, _ = make(list(reversed(chats)), tokenizers["qwen2_5"], **settings)
    assert rejects == {"duplicate_conversation": 1} and len(rows) == 120
    assert [row.sample_id for row in rows] == [row.sample_id for row in again]
    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizers["qwen2_5"])
    sides: dict[str, set[str]] = {}
    for row in rows:
        asked = tokenizer.decode(row.input_ids_T).split("Question ")[1].split("?")[0]
        sides.setdefault(asked, set()).add(row.split)
    assert all(len(found) == 1 for found in sides.values())
    assert 3 <= sum(found == {"heldout"} for found in sides.values()) <= 25
