"""What the hub or the network has to say of a data set, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from schemas.errors import ConfigError, StoreError, first_line
from stages.hub import beneath


@contextmanager
def in_one_line(name: str, doing: str) -> Iterator[None]:
    """Raise ConfigError for what another name or token mends, StoreError for what a retry may."""
    import huggingface_hub.errors as hub

    try:
        yield
    except hub.HFValidationError as error:
        raise ConfigError(f"'{name}' is no hub name: expected owner/name") from error
    except hub.LocalTokenNotFoundError as error:
        raise ConfigError(
            f"cannot {doing} {name}: no token is there; log in by `hf auth login` or set HF_TOKEN"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise ConfigError(
            f"cannot {doing} {name}: the hub has no such revision of it; name a branch or commit "
            f"that is there"
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise ConfigError(
            f"cannot {doing} {name}: the hub has no such data set, or it is private: correct the "
            f"name, or log in by `hf auth login` or HF_TOKEN"
        ) from error
    except hub.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise ConfigError(
                f"cannot {doing} {name}: the hub refuses it to this token ({status}); log in with "
                f"one that may write there, by `hf auth login` or HF_TOKEN"
            ) from error
        raise StoreError(f"cannot {doing} {name}: {first_line(error)}; run it again") from error
    except (OSError, hub.HTTPError) as error:  # type: ignore[attr-defined]  # httpx's own
        raise StoreError(
            f"cannot {doing} {name}: the hub cannot be reached ({beneath(error)}); run it again, "
            f"what has arrived is not sent twice"
        ) from error
