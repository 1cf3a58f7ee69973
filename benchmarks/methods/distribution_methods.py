"""What the students of ``distributions.py`` are trained on: one target each, and where it is made.

``product`` targets are encodings of the stage ``teacher_logits``; ``peer`` ones are written as
another program's rows and come in by ``teachercache import``. A method is tuned with its family.
"""

from dataclasses import dataclass
from typing import Any, Literal

TEXT = "cross-entropy"
EXACT, DEFAULT, FIXED = "exact", "threshold", "threshold-k16"
GHOST, RENORMALISED, DRAWS = "top-12-rest", "top-12-renormalised", "draws-50"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A target by the name of its training step; ``size`` is k, or the number of draws."""

    name: str
    label: str
    family: str
    made: Literal["text", "product", "peer"]
    encoding: dict[str, Any] | None = None
    size: int = 0


def _threshold(tau: float) -> Method:
    name = DEFAULT if tau == 0.04 else f"threshold-{tau:g}".replace(".", "_")
    label = f"threshold, tau {tau:g}" + (" (the default)" if tau == 0.04 else "")
    encoding = {"kind": "threshold", "tau": tau}
    return Method(name=name, label=label, family=DEFAULT, made="product", encoding=encoding)


def _rest(k: int) -> Method:
    encoding = {"kind": "top_k", "k": k}
    label = f"top-{k} and the rest in one bucket"
    name = f"top-{k}-rest"
    return Method(name=name, label=label, family=GHOST, made="product", encoding=encoding, size=k)


def _renormalised(k: int) -> Method:
    name, label = f"top-{k}-renormalised", f"top-{k} renormalised"
    return Method(name=name, label=label, family=RENORMALISED, made="peer", size=k)


def _draws(count: int) -> Method:
    name, label = f"draws-{count}", f"RS-KD, {count} draws"
    return Method(name=name, label=label, family=DRAWS, made="peer", size=count)


_EXACT = {"kind": "exact"}
_FIXED = {"kind": "threshold", "k": 16}
METHODS = (
    Method(name=TEXT, label="cross-entropy, no teacher", family=TEXT, made="text"),
    Method(
        name=EXACT, label="exact: whole distributions", family=EXACT, made="product",
        encoding=_EXACT,
    ),
    *map(_threshold, (0.3, 0.04)),
    Method(
        name=FIXED, label="threshold, k 16", family=FIXED, made="product", encoding=_FIXED, size=16
    ),
    *map(_draws, (12, 50)),
    *map(_rest, (12, 40)),
    *map(_renormalised, (12, 40)),
)  # fmt: skip
FAMILIES = (TEXT, EXACT, DEFAULT, FIXED, DRAWS, GHOST, RENORMALISED)
OF_NAME = {method.name: method for method in METHODS}
