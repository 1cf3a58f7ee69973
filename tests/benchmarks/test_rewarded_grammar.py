"""The grammar with a true reward: what it earns by hand; what is likely earns less."""

import numpy as np

from benchmarks.rewarded_grammar.grammar import (
    COMMON,
    NOUNS,
    RARE,
    Grammar,
    agreeing,
    preferred,
    prompts,
    reward,
)


def test_rewards_by_hand() -> None:
    common, rare = zip(*(agreeing(noun) for noun in "fkp"), strict=True)
    other = next(verb for verb in COMMON if verb not in (common[0], rare[0]))
    best = "".join(noun + verb for noun, verb in zip("fkp", rare, strict=True))
    cases = {
        best + ".": 6.0,
        "~" + best + ".": 7.0,
        "f" + common[0] + ".": 1.25,
        "f" + other + ".": 0.5,
        "f" + rare[0] + "!.": 2.5,
        "f" + rare[0] + "!!.": 1.5,  # the second one is no clause
        "f" + rare[0] + "f" + rare[0] + ".": 1.0,
        "a" + RARE[0] + "!.": -1.5,
        "f~.": -2.0,
        "~.": 1.0,
        ".": 0.0,
        "": -2.0,
        "~": -1.0,
    }
    assert {text: reward("2fkp:", text) for text in cases} == cases
    assert reward("2fkp:", best + ".", finished=False) == 4.0
    assert reward("1fkp:", "~f" + rare[0] + "!.") == 0.5


def test_each_noun_has_two_verbs_that_agree() -> None:
    found = [agreeing(noun) for noun in NOUNS]
    assert {common for common, _ in found} == set(COMMON)
    assert all(COMMON.index(common) == RARE.index(rare) for common, rare in found)


def test_what_is_likely_earns_less_than_what_is_rare() -> None:
    rng = np.random.default_rng(0)
    assert len(set(prompts(5))) == 4 * 16 * 15 * 14 and prompts(5) != prompts(6)
    asked = prompts(5)[:400]
    earned = {
        rare: np.mean([reward(each, Grammar(rare=rare).response(each, rng)) for each in asked])
        for rare in (0.0, 1.0)
    }
    assert earned[1.0] > earned[0.0] + 0.5
    for prompt in asked[:40]:
        chosen, rejected = preferred(prompt, Grammar(), rng, least_gap=1.0)
        assert reward(prompt, chosen) >= reward(prompt, rejected) + 1.0
