"""The page that ``advantages.py`` writes."""

PAGE = """# Advantages: bytes a position, and the gradient they buy

Regenerate with `python benchmarks/advantages/advantages.py --docs docs/measured/` (the figures
below come from that run). {positions} response positions to {prompts} real prompts that no model
here was trained on. The aligned teacher is SmolLM2-135M-Instruct after {dpo_steps} steps of DPO on
real pairs, made by the benchmark, as no aligned teacher of this size comes with the assets; the
reference is the model itself. The student is 26 of its 30 layers after {kd_steps} steps of
distillation: far behind its teacher, less sure of itself, and given to repetition. beta is 1. Where
the student looks, an advantage is {mean_advantage:.3f} nats in size on average; its {top} likeliest
tokens, which its responses carry, hold {known:.0%} of its mass.

"mean gradient" is the relative error of ADPA's gradient with respect to the student's logits,
summed over all positions, "cosine" the angle's; "position" the relative error of all positions as
one long vector. Errors of `threshold` are root mean squares over {seeds} draws. A few draws are not
many: most of the expected square is of tokens that come once in thousands of positions. "expected"
is over all draws, computed from the probabilities with which tokens are kept. Everything is counted
in the bytes: whole shard files over response positions, with the schema and the sums.

{bars}

{rows}

- `threshold` has no bias: all of its error is noise, which halves in the mean with four times as
  many positions. Single positions are noisy, by design. It is the support whose error goes to
  nothing in a long run, whatever the student has become by then. With `k` every position has as
  many tokens; with `tau`, the default, as many as it asks for.
- `union_top_k` gives all tokens that it does not keep one advantage. A position of it is worth far
  more than one of `threshold`, at fewer bytes, and its bias is small; on some thousands of
  positions the two are equal in the mean. Where there is little data it is the better choice.
- `as_released` erases every negative advantage (the published loss clips), which is most of its
  error; without the clipping ("unclipped") what is left is the floor and the missing tokens. Its
  bytes are those of our table; as published a teacher takes 816 B a position, of which two are
  needed.
- `exact` is two float32 hidden states of {width} numbers each; nothing is approximated.

## Where the bytes lie

{columns}

What an objective needs of a token is its advantage over its probability of being drawn: one number,
for which `k` keeps two of 16 bits. With `tau` the probabilities are chosen so that this number is a
power of two for every token that is not sure, so it takes its exponent and its sign and nothing of
it is rounded. A sure token's advantage is rounded at random, without bias, to one of three levels
an octave. Ids are one set by rising id, stored as gaps.

## What decides the noise of `threshold`

Tokens are drawn with probabilities that rise with `m |A|`
(`stages/signals/advantages/supports.py`), m the mean of the three distributions with the student's
unknown rest shared out as the square root of the teachers' mean. An experiment apart (November
2026) computed the expected error of a position's gradient from those probabilities, on 384 such
positions, k = 16:

| drawn by | error |
| --- | --- |
| m, of the student its known tokens alone | 7.1 |
| m, the rest shared out as the teachers' mean | 6.2 |
| m, the rest shared out as its square root | 1.8 |
| the same times abs(A) | 1.2 |
| the same times abs(A - c), with A - c stored, c the mean of A over the unknown rest | 1.05 |
| the student's own distribution times abs(A - c), were it known | 0.34 |

A student that is less sure than its teachers has mass where they have next to none. A token of that
kind is hardly ever drawn by the teachers' opinion, and counts for thousands when it is: sharing the
rest out more evenly is what helps most.

A constant c per position, taken off A before weights are made (the gradient of the whole sum does
not move by it), takes another 15 % off, as much as four more tokens a position: with `tau` it is
kept, as the rest's advantage. With the student's 64 likeliest tokens in the responses in place of
16, the errors are 0.92 (by m abs(A)) and 0.74 (with c).

A second experiment apart (the same month, 1,280 of the positions above) computed the same for
`tau`. By the student itself, and by a later student that has become the mean of both teachers:

| drawn with | tokens a position | error | by a later student |
| --- | --- | --- | --- |
| k = 16 | 16 | 1.15 | 0.22 |
| tau = 0.006 | 7.2 | 1.20 | 0.24 |
| tau = 0.004 | 9.4 | 0.97 | 0.19 |
| tau = 0.003 | 11.4 | 0.83 | 0.15 |
| the same without c | 12.1 | 0.91 | 0.16 |
| the same, at most 32 tokens a position in the place of 64 | 10.8 | 0.90 | 0.17 |
| tau = 0.002 | 14.8 | 0.69 | 0.12 |

Powers of two in the place of thirds of an octave cost nothing at equal bytes. Half of m for the
student, in the place of a third, takes a tenth off the error by the student itself and puts as much
on that by a later one: it is left at a third.
"""
