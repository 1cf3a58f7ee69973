"""What chat templates of today make of a pair: thoughts, tools, marks of their own, blanks.

Wherever a row is kept its ids are compared with those of the library's own rendering of the whole
dialogue; what no row can be made of is counted by its reason.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from schemas.tables.preference_pairs import PreferencePair
from stages.models.causal_lm.end_tokens import stop_tokens_of
from stages.models.checkpoints.chat_template import ChatTemplate
from tests.stages.sources.test_episodes import make_sentencepiece
from tests.stages.sources.test_preference_pairs import (
    CHATML,
    KEPT,
    Folders,
    Make,
    chat,
    record,
    rows_of,
    stage_for,
    template,
)

pytestmark = pytest.mark.slow

USER = "{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
HEADER, END = "<|im_start|>assistant\n", "<|im_end|>"
EMPTY = "<think>\n\n</think>\n\n"
# Thinks in its last turn alone, or not at all: `enable_thinking: false` puts an empty thought into
# the header. What it writes of an answer without a thought has an empty one.
HYBRID = """
{%- macro thought(m) %}
{{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}
{%- endmacro %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>assistant\n' + (thought(m) if loop.last else '') + m.content
 + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""
# Opens a thought in the header alone; dialogues have answers without their thoughts.
OPENED = template(
    "",
    "{% if m.role == 'user' %}" + USER + "{% else %}{{ '<|im_start|>assistant\n'"
    " + m.content.split('</think>')[-1] + '<|im_end|>\n' }}{% endif %}",
    "{{ '<|im_start|>assistant\n<think>\n' }}",
)
# Opens a thought in the header, and writes the last turn's.
ALWAYS = HYBRID.replace("enable_thinking is defined and not enable_thinking", "true").replace(
    "{{- '<think>\n\n</think>\n\n' }}", "{{- '<think>\n' }}"
)
# Puts an empty thought before each last answer, and reads none.
CONSTANT = HYBRID.replace("(m.reasoning_content or '')", "''")
TOOLS = """
{%- if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.content is not none %}{{ m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>' + call.function.name + ' ' + call.function.arguments | tojson + '</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tiny_model, tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return Make(tmp_path)


def said(text: str | None, **more: Any) -> list[dict[str, Any]]:
    """Return a response as chat messages."""
    return [{"role": "assistant", "content": text, **more}]


def require_ids(
    row: PreferencePair, folder: Path, pair: Any, *, header: str, tools: Any = None, **kwargs: Any
) -> Any:
    """Check that prompt and response are the library's dialogue, parted after ``header``."""
    library: Any = AutoTokenizer.from_pretrained(folder)
    prompt = pair["prompt"] if isinstance(pair["prompt"], list) else chat(pair["prompt"])
    sides = ((pair["chosen"], row.chosen_ids_C), (pair["rejected"], row.rejected_ids_R))
    for response, ids_A in sides:
        answer = response if isinstance(response, list) else said(response)
        text = library.apply_chat_template(
            [*prompt, *answer], tools=tools, tokenize=False, **kwargs
        )
        assert library.decode(row.prompt_ids_T).endswith(header)
        assert library.decode([*row.prompt_ids_T, *ids_A]) == text.removesuffix("\n")
        assert (
            ids_A[-1] == library.convert_tokens_to_ids(END) and ids_A.tolist().count(ids_A[-1]) == 1
        )
    given = library.apply_chat_template(
        prompt, tools=tools, add_generation_prompt=True, return_dict=False, **kwargs
    )
    assert row.prompt_ids_T.tolist() == given
    return library


ANSWERS = record(chat("q", "a", "p"), "Good one.", "Bad one.")
THOUGHTS = record(
    chat("q", "a", "p"),
    said("Good one.", reasoning_content="Let me see."),
    said("Bad one.", reasoning_content="Hm."),
)


def test_an_empty_thought_that_nobody_thought_is_no_part_of_a_response(
    folders: Folders, make: Make
) -> None:
    folder = folders.make(HYBRID)
    (row,), rejects = make([THOUGHTS, ANSWERS], folder)
    assert rejects == {"empty_reasoning": 1}
    library = require_ids(row, folder, THOUGHTS, header=HEADER)
    text = library.decode(row.chosen_ids_C)
    assert text == "<think>\nLet me see.\n</think>\n\nGood one.<|im_end|>"
    off = {"enable_thinking": False}
    (row,), rejects = make([THOUGHTS, ANSWERS], folder, chat_template_kwargs=off)
    assert rejects == {"not_after_header": 1}
    library = require_ids(row, folder, ANSWERS, header=HEADER + EMPTY, **off)
    assert library.decode(row.chosen_ids_C) == "Good one.<|im_end|>"
    line = make.refusal([ANSWERS], folder)
    assert "no train row is left of the preference pairs (empty_reasoning 1); the chat tem" in line
    assert f"{folder} opens an answer with what these responses do not hold" in line
    assert "give chat_template_kwargs (such as enable_thinking: false)" in line


def test_an_empty_thought_that_a_response_spells_itself_stays(folders: Folders, make: Make) -> None:
    folder = folders.make(CONSTANT.replace("thought(m) if loop.last else ''", "''"))
    spelled = record("q", EMPTY + "Good one.", "<b> </b> Bad one.")
    (row,), rejects = make([spelled], folder)
    library = require_ids(row, folder, spelled, header=HEADER)
    assert library.decode(row.chosen_ids_C) == f"{EMPTY}Good one.<|im_end|>" and rejects == {}


@pytest.mark.parametrize(
    ("written", "with_thoughts", "without"),
    [
        (OPENED, "unread_reasoning_content", "not_after_header"),
        (CONSTANT, "unread_reasoning_content", "empty_reasoning"),
        (ALWAYS, "", "empty_reasoning"),
    ],
)
def test_templates_that_always_think_cost_the_rows_that_do_not(
    written: str, with_thoughts: str, without: str, folders: Folders, make: Make
) -> None:
    folder = folders.make(written)
    for pair, reason in ((THOUGHTS, with_thoughts), (ANSWERS, without)):
        if reason:
            assert f"({reason} 1)" in make.refusal([pair], folder)
    if not with_thoughts:
        (row,), rejects = make([ANSWERS, THOUGHTS], folder)
        library = require_ids(row, folder, THOUGHTS, header=HEADER + "<think>\n")
        text = library.decode(row.chosen_ids_C)
        assert text == "Let me see.\n</think>\n\nGood one.<|im_end|>" and rejects == {without: 1}


def test_settings_of_a_template(folders: Folders, make: Make) -> None:
    folder = folders.make(HYBRID)
    line = make.refusal([ANSWERS], folder, chat_template_kwargs={"enable_thinkng": False})
    assert f"chat_template_kwargs: the chat template in {folder} reads no enable_thinkng;" in line
    for settings, message in (
        ({"tools": []}, "tools is given by the stage itself"),
        ({"x": float("inf")}, "a number is not finite"),
    ):
        with pytest.raises(ValidationError, match=message):
            make.stage([], folder, chat_template_kwargs=settings)
    with pytest.raises(ValidationError, match="template: plain has none"):
        make.stage([], folder, chat_template_kwargs={"x": 1}, template="plain")
    names = [
        make.stage([ANSWERS], folder, chat_template_kwargs=settings).hashed()["config"]
        for settings in ({}, {"enable_thinking": False})
    ]
    assert names[0]["chat_template_kwargs"] == {} and names[0] != names[1]


WEATHER = {"type": "function", "function": {"name": "weather", "description": "of a place"}}
CALL = {"function": {"name": "weather", "arguments": {"place": "Bern", "day": None}}}
CALLED = [
    *chat("Rain in Bern?"),
    *said(None, tool_calls=[CALL]),
    {"role": "tool", "content": "no", "name": "weather"},
]


def offering(pair: Any, tools: Any = (WEATHER,)) -> Any:
    return pair | {"tools": list(tools) if isinstance(tools, tuple) else tools}


def test_tools_and_calls_reach_the_template(folders: Folders, make: Make) -> None:
    folder = folders.make(TOOLS)
    answered = offering(record(CALLED, "It stays dry.", "It rains."))
    (row,), rejects = make([answered], folder)
    assert rejects == {}
    library = require_ids(row, folder, answered, header=HEADER, tools=[WEATHER])
    text = library.decode(row.prompt_ids_T)
    assert text.startswith("<|im_start|>tools\n[{") and '"of a place"' in text
    assert '<tool_call>weather {"place": "Bern", "day": null}</tool_call><|im_end|>' in text
    calling = offering(record(CALLED[:1], said(None, tool_calls=[CALL]), "No idea."))
    (row,), rejects = make([calling], folder)
    assert rejects == {}
    require_ids(row, folder, calling, header=HEADER, tools=[WEATHER])
    again = [*CALLED, *said("It stays dry."), *chat("And in Rome?")]
    (whole,), _ = make([offering(record(again))], folder)
    (last,), _ = make([offering(record(again[-1:]))], folder)
    room = len(whole.prompt_ids_T) - 1
    rows, rejects = make([offering(record(again))], folder, max_prompt_length=room)
    assert [row.sample_id for row in rows] == [last.sample_id] and rejects == {"turns_dropped": 4}


def test_json_texts_and_columns_of_structs_are_the_same_calls(
    folders: Folders, make: Make, tmp_path: Path
) -> None:
    folder = folders.make(TOOLS)
    call = {"function": {"name": "weather", "arguments": {"place": "Bern"}}}
    spelled = {"function": {"name": "weather", "arguments": '{"place":"Bern"}'}}
    pairs = [
        offering(record(chat("Rain?"), said(None, tool_calls=calls), said("No idea.")), tools)
        for calls in ([call], [spelled], json.dumps([call]))
        for tools in ([WEATHER], json.dumps([WEATHER]), [json.dumps(WEATHER)])
    ]
    rows, rejects = make(pairs, folder)
    assert len(rows) == 1 and rejects == {"duplicate_pair": len(pairs) - 1}
    require_ids(rows[0], folder, pairs[0], header=HEADER, tools=[WEATHER])
    other = {"function": {"name": "time", "arguments": {"zone": "CET"}}}
    timed = offering(record(chat("Late?"), said("Yes."), said(None, tool_calls=[other])))
    pq.write_table(pa.Table.from_pylist([pairs[0], timed]), tmp_path / "pairs.parquet")
    source = {"kind": "parquet", "paths": [str(tmp_path / "pairs.parquet")]}
    stage = stage_for("", folder, source=source)
    found = {row.sample_id for row in rows_of(stage, tmp_path / "columns")}
    assert len(found) == 2 and rows[0].sample_id in found


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record("q", said("a", tool_calls=[CALL]), "b"), "unread_tool_calls"),
        (record(CALLED, "a", "b"), "unread_tool_calls"),
        (record("q", said("a", reasoning_content="r"), "b"), "unread_reasoning_content"),
        (record("q", "a", said("b", thinking="r")), "unread_thinking"),
        (offering(record("q")), "unread_tools"),
        (record("q", said("a", tool_calls=[], id=3, weight=None), "b"), ""),
        (offering(record("q"), []), ""),
        (offering(record("q"), None), ""),
    ],
)
@pytest.mark.parametrize("form", ["chat", "plain"])
def test_what_a_template_does_not_read_costs_the_row(
    form: str, bad: object, reason: str, folders: Folders, make: Make
) -> None:
    rows, rejects = make([bad, KEPT], folders.make(CHATML), template=form)
    assert rejects == ({reason: 1} if reason else {}) and len(rows) == (1 if reason else 2)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (offering(record("q"), "weather"), "bad_tools"),
        (offering(record("q"), {"name": "weather"}), "bad_tools"),
        (offering(record("q"), [3]), "bad_tools"),
        (record("q", said("a", tool_calls=["weather"]), "b"), "bad_tool_calls"),
        (record("q", said("a", tool_calls=[{"function": {}}]), "b"), "bad_tool_calls"),
        (
            record("q", said("a", tool_calls=[{"name": "f", "arguments": "{"}]), "b"),
            "bad_tool_calls",
        ),
        (record("q", said("a", tool_calls=[{"name": "f"}]), "b"), "refused_by_template"),
        (record([*chat("q"), *CALLED[1:]], chat("q", "a"), "b"), "prompts_differ"),
        (record([*CALLED[:1], *CALLED[2:]], "a", "b"), "bad_roles"),
        (
            record("q", said(None, tool_calls=[CALL | {"function": {"name": END}}]), "b"),
            "special_token_in_text",
        ),
        (offering(record("q"), [{"name": "f<|im_start|>"}]), "special_token_in_text"),
        (record("q", said(None, tool_calls=[]), "b"), "empty_response"),
    ],
)
def test_malformed_calls_cost_the_row(
    bad: object, reason: str, folders: Folders, make: Make
) -> None:
    rows, rejects = make([bad, KEPT], folders.make(TOOLS))
    assert len(rows) == 1 and rejects == {reason: 1}


def test_a_template_that_fails_on_a_value_costs_the_row(folders: Folders, make: Make) -> None:
    """In Python beneath Jinja, whose errors are none of Jinja's."""
    folder = folders.make(CHATML + "{# {{ m.tool_calls }} #}" + "{{ messages[-1].tool_calls }}")
    calling = record("q", said(None, tool_calls=[CALL]), "b")
    rows, rejects = make([calling, KEPT], folder)
    assert len(rows) == 1 and rejects == {"refused_by_template": 1}


PLAIN_MARKS = template(
    "",
    "{{ '<|turn|>' + m.role + '\n' + m.content + '<|stop|>\n' }}",
    "{{ '<|turn|>assistant\n' }}",
)


def test_a_closing_token_that_is_not_called_special_closes(
    folders: Folders, make: Make, tiny_model: Path
) -> None:
    folder = folders.make(PLAIN_MARKS)
    library: Any = AutoTokenizer.from_pretrained(folder)
    library.add_tokens(["<|turn|>", "<|stop|>", "\n", "user", "<think>"])
    library.save_pretrained(folder)
    assert "<|stop|>" not in library.all_special_tokens
    (row,), rejects = make([record("q <think> user", "Good\none.", "Bad.")], folder)
    assert library.decode(row.chosen_ids_C) == "Good\none.<|stop|>" and rejects == {}
    assert row.chosen_ids_C[-1] == library.convert_tokens_to_ids("<|stop|>")
    parted = ChatTemplate(library)
    assert parted.closing_text == "<|stop|>"
    assert parted.turn_texts == ("<|stop|>", "<|turn|>")
    for text in ("a<|stop|>\n<|turn|>user", "a <|turn|>", "a</s>"):
        for bad in (record("q", text, "b"), record(text, "a", "b")):
            rows, rejects = make([bad, KEPT], folder)
            assert len(rows) == 1 and rejects == {"special_token_in_text": 1}
    (folder / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    assert int(row.chosen_ids_C[-1]) in stop_tokens_of(folder)


def test_a_response_that_the_template_leaves_open_costs_its_row(
    folders: Folders, make: Make
) -> None:
    folder = folders.make(CHATML.replace("'<|im_end|>\n'", "('' if m.open else '<|im_end|>\n')"))
    rows, rejects = make([record("q", said("a", open=True), "b"), KEPT], folder)
    assert len(rows) == 1 and rejects == {"unclosed_by_template": 1}


def test_blanks_at_the_end_of_a_prompt_go_with_the_response(folders: Folders, make: Make) -> None:
    folder = folders.make(
        template(
            "",
            "{{ '[INST] ' + m.content + ' [/INST] ' if m.role == 'user' else m.content + '</s>' }}",
            "",
        )
    )
    library: Any = AutoTokenizer.from_pretrained(folder)
    for form, prompt, before in (
        ("plain", "Q: a\nA: ", "<s>Q: a\nA:"),
        ("plain", "Q: a\nA:  ", "<s>Q: a\nA:"),
        ("chat", "q", "[INST] q [/INST]"),
    ):
        (row,), rejects = make([record(prompt, "the one", "\nno")], folder, template=form)
        spaces = "  " if prompt.endswith("  ") else " "
        assert library.decode(row.prompt_ids_T) == before and rejects == {}
        assert library.decode(row.chosen_ids_C) == f"{spaces}the one</s>"
        assert library.decode(row.rejected_ids_R) == f"{spaces}\nno</s>"
        whole = library(f"{before}{spaces}the one</s>", add_special_tokens=False).input_ids
        assert [*row.prompt_ids_T, *row.chosen_ids_C] == whole
    (row,), _ = make([record("Q: a\n", "b")], folder, template="plain")
    assert library.decode(row.prompt_ids_T) == "<s>Q: a\n"


def test_a_start_that_the_tokenizer_joins_costs_its_row(tmp_path: Path, make: Make) -> None:
    folder = make_sentencepiece(tmp_path / "sentencepiece")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["\n\n"])
    tokenizer.save_pretrained(folder)
    rows, rejects = make([record("q", "\nyes", "no"), KEPT], folder, template="plain")
    assert len(rows) == 1 and rejects == {"joined_by_tokenizer": 1}


@pytest.mark.parametrize("form", ["chat", "plain"])
def test_a_response_that_names_who_speaks_costs_its_row(
    form: str, folders: Folders, make: Make
) -> None:
    def transcript(chosen: str, rejected: str = "No.", prompt: str = "Hi") -> dict[str, str]:
        before = f"\n\nHuman: {prompt}\n\nAssistant: "
        return {"chosen": before + chosen, "rejected": before + rejected}

    bad = [
        transcript("Human: What do you mean?"),
        transcript("Yes.", "That is a good question.  Human: I am sure."),
        transcript("Yes.\nHuman: Then why?\nAssistant: So."),
        transcript("Let us end here.\nAssistant: By the way"),
    ]
    good = [
        transcript("He is human: so am I."),
        transcript("Pay of a Medical Assistant: low."),
        transcript("A NonHuman: no.", prompt="Is this by a Human: or not?"),
    ]
    rows, rejects = make([*bad, *good], folders.make(CHATML), format="hh_rlhf", template=form)
    assert len(rows) == len(good) and rejects == {"speaker_in_response": len(bad)}
    rows, _ = make([record("q", "Human: I am.", "b")], folders.make(CHATML), template=form)
    assert len(rows) == 1
