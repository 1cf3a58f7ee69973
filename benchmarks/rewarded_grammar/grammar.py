"""A grammar of one character a word, and a true reward that partly conflicts with its likelihood.

A prompt is a style (a digit), three nouns (small letters) and ``:``, such as ``2fkq:``. A response
is a row of clauses, each a noun and a verb (a capital), which ``!`` may follow, perhaps after a
greeting ``~``, and a full stop: ``fBkD!qM.``. Two verbs agree with a noun, a common one and a rare
one. How often each of these is written (``Grammar``) and what it earns (``reward``) are two
matters: the rare verb earns most, foreign nouns and long responses are likely and cost.
"""

import string
from dataclasses import dataclass
from itertools import permutations

import numpy as np

NOUNS = string.ascii_lowercase[:16]
COMMON, RARE = string.ascii_uppercase[:13], string.ascii_uppercase[13:]
STYLES = "0123"
NOTHING = -2.0  # the reward of a response without words
GREETING, EMPHASIS, ASKED, STOP = "~", "!", ":", "."
# The nouns in an order of their own, so that what agrees has to be learnt noun by noun.
_PLACES = np.random.default_rng(7).permutation(len(NOUNS))


def agreeing(noun: str) -> tuple[str, str]:
    """Return the common and the rare verb of a noun."""
    place = _PLACES[NOUNS.index(noun)] % len(COMMON)
    return COMMON[place], RARE[place]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """How likely a written response greets, agrees, takes the rare verb, and emphasises.

    ``clauses`` are the probabilities of one clause, two and so on; ``asked`` is how likely a clause
    is about a noun of the prompt that has not been mentioned, while there is one.
    """

    greets: float = 0.3
    agrees: float = 0.8
    rare: float = 0.25
    emphasises: float = 0.4
    asked: float = 0.8
    clauses: tuple[float, ...] = (0.1, 0.25, 0.3, 0.2, 0.15)

    def response(self, prompt: str, rng: np.random.Generator) -> str:
        """Write one response to a prompt."""
        left = list(prompt[1:-1])
        parts = [GREETING] if rng.random() < self.greets else []
        for _ in range(1 + rng.choice(len(self.clauses), p=self.clauses)):
            if left and rng.random() < self.asked:
                noun = left.pop(rng.integers(len(left)))
            else:
                noun = NOUNS[rng.integers(len(NOUNS))]
            verbs = agreeing(noun)
            if rng.random() < self.agrees:
                verb = verbs[int(rng.random() < self.rare)]
            else:
                verb = (COMMON + RARE)[rng.integers(len(COMMON + RARE))]
            parts += [noun, verb, EMPHASIS if rng.random() < self.emphasises else ""]
        return "".join([*parts, STOP])


def prompts(seed: int) -> list[str]:
    """Return all prompts there are, 13,440, in an order of the seed."""
    found = [style + "".join(nouns) + ASKED for style in STYLES for nouns in permutations(NOUNS, 3)]
    return [found[place] for place in np.random.default_rng(seed).permutation(len(found))]


def reward(prompt: str, response: str, *, finished: bool = True) -> float:
    """Return what a response earns, at most 8.5.

    Each noun of the prompt: 1 when first mentioned, and its verb there 1 if it is the rare one that
    agrees, 0.25 if the common one, else -0.5. A noun again, or one that was not asked for: -1. A
    greeting at the start: 1 in even styles, -1 in odd ones. Emphasis of a clause: 0.5 in styles 2
    and 3 where the clause was asked for, else -0.5. Whatever is no clause: -1 a character. No full
    stop at the end, or a response that did not end there: -2.
    """
    style, left = int(prompt[0]), set(prompt[1:-1])
    earned = 0.0 if finished and response.endswith(STOP) else NOTHING
    response = response.removesuffix(STOP)
    if response.startswith(GREETING):
        earned += -1.0 if style % 2 else 1.0
        response = response[1:]
    place = 0
    while place < len(response):
        noun, verb = response[place], response[place + 1 : place + 2]
        if noun not in NOUNS or not verb or verb not in COMMON + RARE:
            earned -= 1.0
            place += 1
            continue
        place += 2
        asked = noun in left
        if asked:
            left.remove(noun)
            common, rare = agreeing(noun)
            earned += 1.0 + (1.0 if verb == rare else 0.25 if verb == common else -0.5)
        else:
            earned -= 1.0
        if response[place : place + 1] == EMPHASIS:
            earned += 0.5 if asked and style >= 2 else -0.5
            place += 1
    return earned


def preferred(
    prompt: str, grammar: Grammar, rng: np.random.Generator, *, least_gap: float
) -> tuple[str, str]:
    """Return two responses of the grammar to a prompt, that of the larger reward first.

    Drawn until their rewards are ``least_gap`` apart.
    """
    while True:
        pair = [grammar.response(prompt, rng) for _ in range(2)]
        earned = [reward(prompt, response) for response in pair]
        if abs(earned[0] - earned[1]) >= least_gap:
            return (pair[0], pair[1]) if earned[0] > earned[1] else (pair[1], pair[0])
