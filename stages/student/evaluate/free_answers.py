"""Free answers: what a student writes after each prompt, beside the answer of the data.

Decoded greedily. An answer is the first line of what comes after the prompt, white space around it
and special tokens taken away; the answer of the data is cut the same way. Decoding stops at the end
of text or of a turn, or ``SPARE_TOKENS`` after the longest answer of its batch, so a student that
rambles is not cut to fit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from stages.models.causal_lm.end_tokens import answer_ends
from stages.models.causal_lm.greedy_decoding import decode_greedily
from stages.models.checkpoints.tokenizer import open_tokenizer

SPARE_TOKENS = 8

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class FreeAnswer:
    """One episode's answer in the data, and the student's."""

    gold: str
    predicted: str


def generate_answers(
    model: PreTrainedModel, rows: Sequence[Row], *, tokenizer_folder: Path, batch_size: int
) -> list[FreeAnswer]:
    """Decode an answer for each ``episodes`` row, in order; call it in eval and inference mode."""
    tokenizer = open_tokenizer(tokenizer_folder)
    ends = answer_ends(tokenizer, model.generation_config, model.config.get_text_config())
    answers: list[FreeAnswer | None] = [None] * len(rows)
    longest_first = sorted(range(len(rows)), key=lambda i: -int(rows[i]["answer_start"]))
    for start in range(0, len(rows), batch_size):
        chosen = longest_first[start : start + batch_size]
        batch = [rows[i] for i in chosen]
        longest = max(len(row["input_ids_T"]) - row["answer_start"] for row in batch)
        decoded = decode_greedily(
            model,
            [row["input_ids_T"][: row["answer_start"]] for row in batch],
            ends=ends,
            max_new_tokens=longest + SPARE_TOKENS,
        )
        for i, row, new_ids in zip(chosen, batch, decoded, strict=True):
            gold_ids = row["input_ids_T"][row["answer_start"] :].tolist()
            said_ids = [token for token in new_ids if token not in ends]
            answers[i] = FreeAnswer(
                gold=_first_line(tokenizer.decode(gold_ids, skip_special_tokens=True)),
                predicted=_first_line(tokenizer.decode(said_ids, skip_special_tokens=True)),
            )
    return [answer for answer in answers if answer is not None]


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0].strip()
