"""``rounds`` of a training step as steps of the graph, named as ``teachercache plan`` names them.

A round is the training step with those tables among what leads to its data that its student makes,
and the tables made of them; the last round has the plain names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Training:
    """A training step whose rounds are wanted, and what its recipe says beside.

    ``named`` are the steps and models that each step names, ``model_of`` says of a model's name
    which model is meant, whatever dtype and engine it is run in.
    """

    name: str
    student: str
    data: tuple[str, ...]
    rounds: int
    named: Mapping[str, tuple[str, ...]]
    model_of: Mapping[str, Any]

    def is_student(self, reference: str) -> bool:
        """Whether a name means what the first round begins with."""
        return bool(self._who(reference) == self._who(self.student))

    def _who(self, reference: str) -> Any:
        return self.model_of.get(reference, reference)

    def within(self, steps: Mapping[str, Any]) -> list[str]:
        """Return the tables that every round makes anew, in their order."""
        leading, wanted = set(), list(self.data)
        while wanted:
            name = wanted.pop()
            if name not in leading and name in steps and steps[name].kind == "table":
                leading.add(name)
                wanted += self.named.get(name, ())
        found: list[str] = []
        for name in steps:
            refs = self.named.get(name, ())
            if name in leading and any(self.is_student(ref) or ref in found for ref in refs):
                found.append(name)
        return found


def with_rounds(steps: Mapping[str, Any], training: Training) -> dict[str, Any]:
    """Return the steps, ``training`` the last of them, with a step for each round of it."""
    within = training.within(steps)
    once = [*within, training.name]
    found = {name: step for name, step in steps.items() if name not in once}
    for number in range(1, training.rounds + 1):
        names = {name: _name(name, number, training.rounds) for name in once}
        before = _name(training.name, number - 1, training.rounds)
        for name in once:
            needs = [names.get(need, need) for need in steps[name].needs]
            if number > 1 and any(training.is_student(ref) for ref in training.named.get(name, ())):
                needs = [before, *(need for need in needs if not training.is_student(need))]
            found[names[name]] = replace(
                steps[name], name=names[name], needs=tuple(dict.fromkeys(needs))
            )
    return found


def _name(name: str, number: int, rounds: int) -> str:
    return name if number == rounds else f"{name}-r{number}"
