"""Errors of libraries in one line: what is wrong, not how much."""

import pytest
from pydantic import BaseModel, ValidationError, field_validator

from schemas.errors import first_line


class Settings(BaseModel):
    """As vLLM checks the model that it is given."""

    architecture: str

    @field_validator("architecture")
    @classmethod
    def is_known(cls, value: str) -> str:
        raise ValueError(f"Model architectures ['{value}'] are not supported.\nThere are: many")


def test_an_error_of_pydantic_says_what_is_wrong() -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(architecture="RwkvForCausalLM")
    assert str(caught.value).startswith("1 validation error for Settings\n")
    said = first_line(caught.value)
    assert said == "Model architectures ['RwkvForCausalLM'] are not supported."


def test_other_errors_say_their_first_line_or_their_name() -> None:
    assert first_line(OSError("not there\nat all")) == "not there"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(ValueError("many, " * 100)) == ("many, " * 100)[:296] + " ..."
