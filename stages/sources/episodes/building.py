"""Drawn examples -> rows of the ``episodes`` table: token ids with every span exact.

A row too long for ``max_length`` loses whole demonstrations from the front (counted as
``demonstrations_dropped``); an answer or a query is never cut. Its length is that with its longest
candidate in the place of the answer, so that every candidate can be scored. Rejected and counted:
``too_long`` (not one of its demonstrations fits), ``duplicate_episode`` (a row with these very
tokens and spans is there), ``token_outside_vocabulary``, ``options_of_same_tokens`` (two candidates
that the tokenizer cannot tell apart), ``answer_without_tokens``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np

from schemas.errors import ConfigError
from schemas.sample_id import HEX_DIGITS
from schemas.tables.episodes import Episode
from stages.sources.episodes.draws import DrawnEpisode
from stages.sources.episodes.templates import EpisodeTemplate
from stages.sources.reading.cleaning import digest_of
from stages.sources.reading.rejects import Rejects, UnusableRecord, beginning
from stages.sources.reading.tokens import IdArray, TextTokenizer
from stages.sources.tasks.task import Example, Task

_NO_IDS = np.zeros(0, np.uint32)


class EpisodeBuilder:
    """Makes rows with one tokenizer, template and maximum length."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        template: EpisodeTemplate,
        max_length: int,
        rejects: Rejects,
    ) -> None:
        """Tokenise the separator; raises ConfigError where it has no tokens of its own."""
        tokenizer.require(length=max_length, eos=False)
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.rejects = rejects
        self.prefix_ids = tokenizer.prefix_ids
        self.separator_ids = tokenizer.encode_separator(template.separator)
        self._ids: dict[str, IdArray] = {}
        self._candidates: dict[tuple[str, ...], list[IdArray]] = {}

    def build_all(self, drawn: Iterable[DrawnEpisode]) -> list[Episode]:
        """Return distinct rows; of equal ones the first stays, wherever it is from."""
        rows: dict[str, Episode] = {}
        places: dict[str, str] = {}
        for one in drawn:
            row = self.build(one)
            if row is None:
                continue
            first = places.setdefault(row.sample_id, one.query.place)
            if row.sample_id not in rows:
                rows[row.sample_id] = row
                continue
            with self.rejects.passing(one.query.place):
                said = f"sample {row.sample_id} is that of {first}"
                raise UnusableRecord("duplicate_episode", said)
        return list(rows.values())

    def build(self, drawn: DrawnEpisode) -> Episode | None:
        """Return the row, or None where it is rejected (counted and listed)."""
        with self.rejects.passing(drawn.query.place):
            return self._built(drawn)
        return None

    def _built(self, drawn: DrawnEpisode) -> Episode:
        task, query = drawn.task, drawn.query
        options = task.options_of(query)
        candidates = self.candidate_ids(task, options)
        query_parts = self.parts(task, query, drawn.wording)
        demonstrations = [self.parts(task, d, drawn.wording) for d in drawn.demonstrations]
        kept = self._within_length(demonstrations, query_parts, candidates)
        if kept is None:
            raise UnusableRecord("too_long", f"of {_named(drawn)}, draw {drawn.draw}")
        row = self._row(drawn, kept, query_parts, candidates)
        top = max(int(ids.max(initial=0)) for ids in (row.input_ids_T, row.candidate_ids_C))
        if top >= self.tokenizer.vocab_size:
            raise UnusableRecord("token_outside_vocabulary", f"token {top} of {_named(drawn)}")
        self.rejects.counts["demonstrations_dropped"] += len(demonstrations) - len(kept)
        return row

    def parts(self, task: Task, example: Example, wording: int) -> tuple[IdArray, IdArray]:
        """Return the ids of an example's query part and of its answer part."""
        query = self._part_ids(self.template.query_part(example.inputs[wording]))
        return query, self._answer_ids(example.output)

    def candidate_ids(self, task: Task, options: tuple[str, ...]) -> list[IdArray]:
        """Return the ids of each option; raises ConfigError where two of a task have the same."""
        found = self._candidates.get(options)
        if found is None:
            found = [self._answer_ids(option) for option in options]
            seen: dict[bytes, str] = {}
            for option, ids in zip(options, found, strict=True):
                other = seen.setdefault(ids.tobytes(), option)
                if other != option and not task.options:
                    raise UnusableRecord("options_of_same_tokens", f"'{other}' and '{option}'")
                if other != option:
                    raise ConfigError(
                        f"task '{task.name}': options '{other}' and '{option}' have the same "
                        f"tokens; the tokenizer cannot tell them apart: rename or remove one"
                    )
            self._candidates[options] = found
        return found

    def _answer_ids(self, output: str) -> IdArray:
        ids = self._part_ids(self.template.answer_part(output))
        if not len(ids):
            raise UnusableRecord("answer_without_tokens", f"the answer {beginning(output)}")
        return ids

    def _part_ids(self, text: str) -> IdArray:
        if text not in self._ids:
            self._ids[text] = self.tokenizer.encode_part(text)
        return self._ids[text]

    def _within_length(
        self,
        demonstrations: Sequence[tuple[IdArray, IdArray]],
        query_parts: tuple[IdArray, IdArray],
        candidates: Sequence[IdArray],
    ) -> list[tuple[IdArray, IdArray]] | None:
        """Return the demonstrations that fit, from the last back; None where that is too few."""
        query, answer = query_parts
        longest = max(len(ids) for ids in (answer, *candidates))
        room = self.max_length - len(self.prefix_ids) - len(query) - longest
        if room < 0:
            return None
        lengths = [len(q) + len(a) + len(self.separator_ids) for q, a in reversed(demonstrations)]
        fitting = sum(total <= room for total in accumulate(lengths))
        if demonstrations and not fitting:
            return None
        return list(demonstrations[len(demonstrations) - fitting :])

    def _row(
        self,
        drawn: DrawnEpisode,
        demonstrations: Sequence[tuple[IdArray, IdArray]],
        query_parts: tuple[IdArray, IdArray],
        candidates: Sequence[IdArray],
    ) -> Episode:
        examples = [part for q, a in demonstrations for part in (q, a, self.separator_ids)]
        input_ids_T = np.concatenate([self.prefix_ids, *examples, *query_parts])
        edges = np.cumsum([len(self.prefix_ids), *map(len, examples)])
        spans_M3 = edges[:-1].reshape(-1, 3)  # of each: start, start and end of its answer
        query_start = int(edges[-1])
        answer_start = query_start + len(query_parts[0])
        lengths_N = np.array([len(ids) for ids in candidates], np.int32)
        candidate_ids_C = np.concatenate([_NO_IDS, *candidates])
        options = drawn.task.options_of(drawn.query)
        row = Episode(
            sample_id="",
            split=drawn.split,
            task=drawn.task.name,
            kind=drawn.task.kind,
            query_id=digest_of(drawn.task.name, drawn.query.content)[:HEX_DIGITS],
            draw=drawn.draw,
            input_ids_T=input_ids_T,
            demonstrations_M3=spans_M3.astype(np.int32),
            query_start=query_start,
            answer_start=answer_start,
            candidate_ids_C=candidate_ids_C,
            candidate_lengths_N=lengths_N,
            gold=options.index(drawn.query.output) if options else -1,
        )
        return replace(row, sample_id=row.hashed_id)


def _named(drawn: DrawnEpisode) -> str:
    return f"task '{drawn.task.name}', query {beginning(drawn.query.inputs[drawn.wording])}"
