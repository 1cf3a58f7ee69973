"""What lets somebody in is never part of an error, wherever it came from."""

import pickle

import pytest

from schemas.errors import ConfigError, redacted
from schemas.storage.files import as_folder
from schemas.storage.object_path import ObjectPath


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("get https://me:pl4nted@host/x: 404", "get https://***@host/x: 404"),
        ("https://pl4nted@host", "https://***@host"),
        ("s3://AKIA:pl4n/ted@bucket/x", "s3://***@bucket/x"),
        ("https://h/x?X-Amz-Signature=pl4nted&b=1", "https://h/x?X-Amz-Signature=***&b=1"),
        ("https://h/x?b=1&token=pl4nted", "https://h/x?b=1&token=***"),
        ("Illegal header value b'Bearer pl4nted_12\\n'", "Illegal header value b'Bearer ***\\n'"),
        ("token hf_pl4ntedpl4ntedpl4nted is", "token *** is"),
    ],
)
def test_secrets_by_their_form(text: str, expected: str) -> None:
    assert redacted(text) == expected
    assert str(ConfigError(text)) == expected
    assert str(pickle.loads(pickle.dumps(ConfigError(text)))) == expected


@pytest.mark.parametrize(
    "text",
    [
        "no file matches '/data/a@b/*.jsonl' (looked from /x)",
        "s3://bucket/a@b/c: not there",
        "'a' is 3, expected key=value or https://host:80/x?k=8",
        "the basic idea of a bearer",
    ],
)
def test_all_else_stays(text: str) -> None:
    assert redacted(text) == text


def test_values_of_variables_that_hold_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "pl4nted/secret")
    monkeypatch.setenv("MY_TOKEN", "pl4nted-token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/me/token-file")
    monkeypatch.setenv("SHORT_TOKEN", "true")
    said = "true: pl4nted/secret and pl4nted-token of /home/me/token-file"
    assert redacted(said) == "true: *** and *** of /home/me/token-file"


def test_a_place_with_credentials_is_refused_without_repeating_them() -> None:
    for place in ("s3://KEY:pl4nted@bucket/x", "gs://pl4nted@bucket", "s3://KEY:pl4/nted@bucket"):
        with pytest.raises(ConfigError, match="has credentials before its bucket") as error:
            as_folder(place)
        assert "pl4" not in str(error.value) and "nted" not in str(error.value)
    arn = "s3://arn:aws:s3:eu-west-1:1:accesspoint/a/b@c"
    assert as_folder(arn) == ObjectPath(arn)
    assert as_folder("s3://bucket/a@b") == ObjectPath("s3://bucket/a@b")
