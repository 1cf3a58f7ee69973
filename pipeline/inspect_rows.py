"""A readable look at rows: the text, and at each position what the teacher thought."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from pipeline.inspect_pairs import (
    Decode,
    advantages_table,
    pair_table,
    response_logprobs_table,
    responses_table,
)
from schemas.distribution import unpack_threshold, unpack_top_k
from schemas.errors import ConfigError
from schemas.open_table import known_table
from schemas.storage.files import Folder
from schemas.storage.manifest import Manifest, read_manifest
from schemas.storage.shard_cache import local_file
from schemas.storage.shards import read_shard
from schemas.table import Table
from schemas.tables.advantages import (
    ExactAdvantages,
    ReleasedAdvantages,
    ThresholdAdvantages,
    UnionAdvantages,
)
from schemas.tables.candidate_scores import CandidateScores
from schemas.tables.documents import Document
from schemas.tables.episodes import Episode, split_candidates
from schemas.tables.preference_pairs import PreferencePair
from schemas.tables.response_logprobs import ResponseLogprobs
from schemas.tables.responses import Responses
from schemas.tables.subset_preferences import SubsetPreferences, split_subsets
from schemas.tables.teacher_logits import ThresholdLogits, TopKLogits


def inspect_rows(
    console: Console,
    folder: Folder,
    *,
    first: int,
    count: int,
    positions: int,
    top: int,
    tokenizer: Path | None,
) -> None:
    """Print rows ``first`` .. ``first + count - 1`` of a finished table."""
    manifest = read_manifest(folder)
    table = known_table(manifest, folder)
    decode = _decoder(tokenizer)
    console.print(
        f"{manifest.table} {manifest.variant} version {manifest.version}, "
        f"{manifest.num_rows} rows, vocabulary {manifest.vocab_size}, "
        f"fingerprint {manifest.fingerprint[:12]}",
        highlight=False,
        soft_wrap=True,
    )
    rows = list(islice(_rows_from(folder, manifest, table, first), count))
    if not rows:
        raise ConfigError(f"{folder} has {manifest.num_rows} rows, there is no row {first}")
    for index, (split, row) in enumerate(rows, start=first):
        console.print(f"\nrow {index}  sample_id {row.sample_id}  split {split}", highlight=False)
        match row:
            case Document():
                _print_text(console, row.input_ids_T, decode)
            case Episode():
                console.print(_episode_table(row, decode))
            case SubsetPreferences():
                console.print(_subsets_table(row))
            case CandidateScores():
                console.print(_candidates_table(row))
            case PreferencePair():
                console.print(pair_table(row, decode))
            case Responses():
                console.print(responses_table(row, decode))
            case ResponseLogprobs():
                console.print(response_logprobs_table(row))
            case (
                ExactAdvantages() | ThresholdAdvantages() | UnionAdvantages() | ReleasedAdvantages()
            ):
                whole, view = advantages_table(row, positions=positions, top=top, decode=decode)
                console.print(whole, highlight=False)
                console.print(view)
            case _:
                console.print(_positions_table(row, positions=positions, top=top, decode=decode))


def _rows_from(folder: Folder, manifest: Manifest, table: Table[Any], first: int) -> Any:
    skipped = 0
    for shard in manifest.shards:
        if skipped + shard.num_rows <= first:
            skipped += shard.num_rows
            continue
        with local_file(folder / shard.file, shard.sha256) as file:
            content = read_shard(file)
        for batch in content.to_batches():
            for row in table.rows(batch):
                if skipped >= first:
                    yield shard.split, row
                skipped += 1


def _decoder(tokenizer: Path | None) -> Decode:
    if tokenizer is None:
        return lambda ids: " ".join(str(int(token)) for token in ids)
    from transformers import AutoTokenizer  # only when text is asked for

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return lambda ids: str(loaded.decode([int(token) for token in ids]))


def _print_text(console: Console, input_ids_T: Any, decode: Decode) -> None:
    text = decode(input_ids_T)
    console.print(f"{len(input_ids_T)} tokens: {text!r}", markup=False, highlight=False)


def _episode_table(row: Episode, decode: Decode) -> RichTable:
    """One line a part, as it was tokenised; the answer's candidates last."""
    kind = f"{row.kind}, draw {row.draw} of query {row.query_id}"
    view = RichTable("part", "tokens", "input", "answer", title=Text(f"{row.task} ({kind})"))
    spans = [*row.demonstrations_M3.tolist()]
    spans.append([row.query_start, row.answer_start, len(row.input_ids_T)])
    names = [*(f"demonstration {m}" for m in range(len(spans) - 1)), "query"]
    for name, (start, answer, end) in zip(names, spans, strict=True):
        texts = [repr(decode(row.input_ids_T[a:b])) for a, b in ((start, answer), (answer, end))]
        view.add_row(name, f"{start}..{end}", Text(texts[0]), Text(texts[1]))
    candidates = split_candidates(row.candidate_ids_C, row.candidate_lengths_N)
    for number, candidate in enumerate(candidates):
        mark = " (right)" if number == row.gold else ""
        text = Text(repr(decode(candidate)))
        view.add_row(f"candidate {number}{mark}", str(len(candidate)), "", text)
    return view


def _subsets_table(row: SubsetPreferences) -> RichTable:
    view = RichTable("rank", "log Q (nats)", "demonstrations kept")
    subsets = split_subsets(row.subset_demonstrations_S, row.subset_sizes_N)
    scored = zip(row.ranks_N.tolist(), row.answer_logprobs_N.tolist(), subsets, strict=True)
    for rank, logprob, subset in sorted(scored, key=lambda entry: (entry[0], -entry[1])):
        view.add_row(str(rank), f"{logprob:.3f}", ", ".join(map(str, subset)) or "none")
    return view


def _candidates_table(row: CandidateScores) -> RichTable:
    view = RichTable("candidate", "tokens", "log p (nats)", "a token")
    scores = zip(row.candidate_logprobs_N.tolist(), row.candidate_num_tokens_N, strict=True)
    for number, (logprob, length) in enumerate(scores):
        view.add_row(str(number), str(length), f"{logprob:.3f}", f"{logprob / length:.3f}")
    return view


def _positions_table(row: Any, *, positions: int, top: int, decode: Decode) -> RichTable:
    view = RichTable("predicts", "entropy", "log p(next)", "the teacher's tokens (probability)")
    entries = _entries(row)
    for j in range(min(positions, row.num_positions)):
        kept = sorted(entries[j], key=lambda entry: -entry[1])[:top]
        words = "  ".join(f"{decode([token])!r} {weight:.3f}" for token, weight in kept)
        view.add_row(
            f"token {row.first_target + j}",
            f"{float(row.entropies_P[j]):.2f}",
            f"{float(row.next_token_logprobs_P[j]):.2f}",
            words or "hidden state only (exact encoding)",
        )
    return view


def _entries(row: Any) -> list[list[tuple[int, float]]]:
    """Return (token id, weight) pairs for each position; none for the exact encoding."""
    if isinstance(row, ThresholdLogits):
        weights_PK = unpack_threshold(row.token_ids_PK, row.num_head_P, row.head_codes_E)
    elif isinstance(row, TopKLogits):
        weights_PK = unpack_top_k(row.logprobs_PK, row.rest_logprobs_P)[0]
    else:
        return [[] for _ in range(row.num_positions)]
    ids_PK = np.asarray(row.token_ids_PK).tolist()
    return [list(zip(i, w, strict=True)) for i, w in zip(ids_PK, weights_PK.tolist(), strict=True)]
