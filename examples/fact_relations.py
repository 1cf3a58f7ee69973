"""Relations between words, and their facts out of countryinfo's and gensim's data files.

Templates are ours. Each is in LAMA's form; those in which the object is not last are for readers
that can use them (a decoder cannot).
"""

from collections.abc import Iterator
from typing import Any

TEMPLATES = {
    "capital": (
        "The capital of [X] is [Y] .",
        "[X] is governed from its capital, [Y] .",
        "The capital city of [X] is called [Y] .",
        "[Y] is the capital of [X] .",
    ),
    "continent": (
        "[X] belongs to the continent of [Y] .",
        "[X] is a place in [Y] .",
        "On the map, [X] is found in [Y] .",
    ),
    "subregion": (
        "[X] belongs to the region of [Y] .",
        "[X] is a place in [Y] .",
        "On the map, [X] is found in [Y] .",
    ),
    "currency": (
        "The currency of [X] is the [Y] .",
        "People in [X] pay with the [Y] .",
        "In [X] prices are given in the [Y] .",
    ),
    "currency_code": (
        "The currency code of [X] is [Y] .",
        "Prices in [X] are given in [Y] .",
        "Banks in [X] abbreviate their money as [Y] .",
    ),
    "nationality": (
        "People from [X] are called [Y] .",
        "Someone from [X] is [Y] .",
        "The adjective for [X] is [Y] .",
    ),
    "city_in_state": (
        "[X] is a city in the state of [Y] .",
        "The city of [X] lies in [Y] .",
        "[X] is located in [Y] .",
    ),
    "adverb": (
        "The adverb of [X] is [Y] .",
        "The adjective [X] makes the adverb [Y] .",
        "[X] becomes [Y]",
    ),
    "opposite": ("The opposite of [X] is [Y] .", "What is not [X] is [Y] .", "[X] versus [Y]"),
    "comparative": (
        "The comparative of [X] is [Y] .",
        "This one is [X], but that one is [Y] .",
        "[X] becomes [Y]",
    ),
    "superlative": (
        "The superlative of [X] is [Y] .",
        "All are [X], but this one is the [Y] .",
        "[X] becomes [Y]",
    ),
    "past_tense": (
        "The past tense of [X] is [Y] .",
        "Today they are [X], and yesterday they [Y] .",
        "[X] becomes [Y]",
    ),
    "plural": (
        "The plural of [X] is [Y] .",
        "There is one [X], and there are two [Y] .",
        "[X] becomes [Y]",
    ),
}
ANALOGIES = {  # sections of gensim's questions-words.txt
    "capital-common-countries": "capital",
    "capital-world": "capital",
    "currency": "currency",
    "city-in-state": "city_in_state",
    "gram6-nationality-adjective": "nationality",
    "gram1-adjective-to-adverb": "adverb",
    "gram2-opposite": "opposite",
    "gram3-comparative": "comparative",
    "gram4-superlative": "superlative",
    "gram7-past-tense": "past_tense",
    "gram8-plural": "plural",
}
SUBJECT_SECOND = ("capital-common-countries", "capital-world")  # "Athens Greece"

Facts = dict[str, dict[str, str]]  # relation -> subject -> object


def add_country(facts: Facts, country: dict[str, Any]) -> None:
    """Add what is known of one country; an object that is the subject itself tells nothing."""
    found: dict[str, object] = {
        "capital": country.get("capital"),
        "continent": country.get("region"),
        "subregion": country.get("subregion"),
        "currency_code": next(iter(country.get("currencies") or ()), None),
        "nationality": country.get("demonym"),
    }
    name = country["name"].strip()
    for relation, label in found.items():
        if isinstance(label, str) and label.strip() not in ("", name):  # some have no one capital
            facts[relation][name] = label.strip()


def add_analogies(facts: Facts, text: str) -> None:
    """Add word pairs out of lines of two pairs; what is known of a subject already stays."""
    for section, first, second in pairs_of(text):
        subject, label = (second, first) if section in SUBJECT_SECOND else (first, second)
        if section in ANALOGIES:
            facts[ANALOGIES[section]].setdefault(subject, label)


def pairs_of(text: str) -> Iterator[tuple[str, str, str]]:
    section = ""
    for line in text.splitlines():
        if line.startswith(": "):
            section = line[2:]
        else:
            first, second, third, fourth = line.split()
            yield section, first, second
            yield section, third, fourth
