"""Packages that settings of a training step need beside the trainer's own: are they there?"""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec

from schemas.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Package:
    """One of ``modules`` has to be there for ``setting``; ``install`` names what brings it."""

    setting: str
    modules: tuple[str, ...]
    install: str


def require_packages(packages: Iterable[Package]) -> None:
    """Raise ConfigError for the first that is not installed here."""
    for package in packages:
        if not any(find_spec(module) for module in package.modules):
            raise ConfigError(
                f"{package.setting} needs the package {package.modules[0]}, which is not "
                f"installed: install {package.install}, or choose otherwise"
            )
