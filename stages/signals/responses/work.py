"""The work of ``responses``: prompts to a generator, its tokens to rows.

A whole shard's prompts go to the generator as one unit and in one order, ``n`` requests each, so
that a re-run meets the same batches. The seed of a request is a hash of the recipe's seed, the
sample and the number of the draw.

A row is whole or rejected: where one of its ``n`` responses is empty, all of it is.

Cost: each step of decoding reads all weights for one more token of every response that is under
way, so a wide shard takes little longer than a narrow one, until the cores are busy. SmolLM2-135M
float32, 2 cores, 64 short prompts at once: 360 tokens/s (vLLM 0.32), 280 (transformers 5.19).

Dimensions: N = responses to a prompt, A = tokens of all of them, K = likeliest tokens kept.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa

from schemas.errors import ConfigError
from schemas.scored_spans import SCORED
from schemas.tables.conversations import CONVERSATIONS, Conversation
from schemas.tables.preference_pairs import PREFERENCE_PAIRS
from schemas.tables.prompted.responses import FINISH_REASONS, Responses
from stages.models.causal_lm.end_tokens import stop_tokens_of
from stages.models.engines.decoding import Decoding, Generated
from stages.models.engines.generator import Generator, open_generator
from stages.models.engines.sequences import TokenIds, require_room
from stages.signals.responses.stage import ResponsesStage
from stages.stage import Rejected, StageContext, Work


@contextmanager
def open_work(stage: ResponsesStage, context: StageContext) -> Iterator[Work]:
    """Start the generator of ``stage.model``; the work answers one shard of prompts."""
    model = context.models[stage.model]
    decoding = Decoding(
        max_tokens=stage.max_tokens,
        stop_token_ids=stage.stop_token_ids or stop_tokens_of(model.path),
        temperature=stage.temperature,
        top_p=stage.top_p,
        top_k=stage.top_k,
    )
    _require_known(decoding.stop_token_ids, context.vocab_size)
    with open_generator(
        model.engine, model.path, dtype=model.dtype, options=context.engine
    ) as generator:

        def work(shard: pa.Table) -> Iterable[Responses | Rejected]:
            prompts = prompts_of(shard)
            longest = max((len(prompt.prompt_ids_T) for prompt in prompts), default=0)
            longest += decoding.max_tokens
            require_room(generator, longest, context.engine, what="a prompt with max_tokens")
            return generate_responses(stage, generator, decoding, prompts)

        yield work


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is answered, and the row that it is of."""

    sample_id: str
    prompt_ids_T: TokenIds


def prompts_of(shard: pa.Table) -> list[Prompt]:
    """Return the prompts of a shard of ``preference_pairs`` or ``conversations``, in order.

    Of a conversation that is all before its last answer, or all of it where none is scored.
    """
    batches = shard.to_batches()
    if SCORED not in shard.schema.names:
        pairs = (pair for batch in batches for pair in PREFERENCE_PAIRS.rows(batch))
        return [Prompt(pair.sample_id, pair.prompt_ids_T) for pair in pairs]
    rows = (row for batch in batches for row in CONVERSATIONS.rows(batch))
    return [Prompt(row.sample_id, row.input_ids_T[: _answer_start(row)]) for row in rows]


def _answer_start(row: Conversation) -> int | None:
    return int(row.scored_S2[-1][0]) if len(row.scored_S2) else None


def _require_known(stop_token_ids: Sequence[int], vocab_size: int) -> None:
    unknown = [token for token in stop_token_ids if not 0 <= token < vocab_size]
    if unknown:
        raise ConfigError(
            f"stop_token_ids has {unknown}, the model's vocabulary is 0 to {vocab_size - 1}: it "
            f"could never generate them; name its own"
        )


def generate_responses(
    stage: ResponsesStage,
    generator: Generator,
    decoding: Decoding,
    prompts: Sequence[Prompt],
) -> Iterator[Responses | Rejected]:
    """Yield one row, or one rejection, for each prompt, in order."""
    reasons = [_prompt_problem(prompt, generator, decoding) for prompt in prompts]
    asked = [prompt for prompt, reason in zip(prompts, reasons, strict=True) if not reason]
    draws = [(prompt, draw) for prompt in asked for draw in range(stage.n)]
    responses = generator.generate(
        [prompt.prompt_ids_T for prompt, _ in draws],
        [request_seed(stage.seed, prompt.sample_id, draw) for prompt, draw in draws],
        decoding,
    )
    for prompt, reason in zip(prompts, reasons, strict=True):
        if reason:
            yield Rejected(prompt.sample_id, reason)
            continue
        yield _row(prompt, list(islice(responses, stage.n)), generator.vocab_size)


def request_seed(seed: int, sample_id: str, draw: int) -> int:
    """Return the 63-bit seed of one response, on any machine and in any order the same."""
    digest = hashlib.blake2b(f"{seed}:{sample_id}:{draw}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _prompt_problem(prompt: Prompt, generator: Generator, decoding: Decoding) -> str:
    if len(prompt.prompt_ids_T) + decoding.max_tokens > generator.max_length:
        return (
            f"the prompt leaves less than max_tokens {decoding.max_tokens} of the model's window "
            f"of {generator.max_length} tokens"
        )
    if int(prompt.prompt_ids_T.max()) >= generator.vocab_size:
        return f"prompt token outside the vocabulary of {generator.vocab_size}"
    return ""


def _row(prompt: Prompt, responses: Sequence[Generated], vocab_size: int) -> Responses | Rejected:
    problem = next(filter(None, (_problem(response, vocab_size) for response in responses)), "")
    if problem:
        return Rejected(prompt.sample_id, problem)
    top_logprobs_AK = np.concatenate([response.top_logprobs_AK for response in responses])
    return Responses(
        sample_id=prompt.sample_id,
        prompt_ids_T=prompt.prompt_ids_T,
        response_ids_A=np.concatenate([response.token_ids_A for response in responses]),
        response_lengths_N=np.array([len(r.token_ids_A) for r in responses], np.int32),
        finish_reasons_N=np.array([_finish_code(r) for r in responses], np.uint8),
        logprobs_A=np.concatenate([response.logprobs_A for response in responses]),
        top_ids_AK=np.concatenate([response.top_ids_AK for response in responses]),
        top_logprobs_AK=top_logprobs_AK.astype(np.float16),
    )


def _finish_code(response: Generated) -> int:
    return FINISH_REASONS.index("stop" if response.stopped else "length")


def _problem(response: Generated, vocab_size: int) -> str:
    """Return why a response cannot be kept, ``""`` if it can."""
    token_ids_A = response.token_ids_A
    if not len(token_ids_A) or response.is_empty:
        return "empty response"
    if not 0 <= token_ids_A.min() <= token_ids_A.max() < vocab_size:
        return f"generated token outside the vocabulary of {vocab_size}"
    with np.errstate(over="ignore"):
        top_logprobs_AK = response.top_logprobs_AK.astype(np.float16)
    if not (np.isfinite(response.logprobs_A).all() and np.isfinite(top_logprobs_AK).all()):
        return "non-finite log-prob"
    return ""
