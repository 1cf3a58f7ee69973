"""Why an object store did not do what it was asked, in one line that says what to mend."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..errors import ConfigError, StoreError, TeacherCacheError

_REFUSED = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken")
_NO_CREDENTIALS = (
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"),
    *("ProfileNotFound", "SSOTokenLoadError", "UnauthorizedSSOTokenError", "TokenRetrievalError"),
)


def code_of(error: BaseException) -> str:
    """Return the store's own code of an error, such as NoSuchBucket; empty where it gave none."""
    for found in (error, error.__cause__):
        response = getattr(found, "response", None)
        if isinstance(response, Mapping):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


@contextmanager
def told(what: str, place: str) -> Iterator[None]:
    """Say in one line why a store did not do what it was asked; a missing object is not that."""
    try:
        yield
    except TeacherCacheError:
        raise
    except Exception as error:
        code, kind = code_of(error), type(error).__name__
        bucket = place.split("://")[1].split("/")[0]
        if code == "NoSuchBucket":
            raise ConfigError(
                f"bucket '{bucket}' does not exist, wanted for {place}: make it, or correct the "
                f"place (execution.root) or the endpoint (AWS_ENDPOINT_URL)"
            ) from error
        if isinstance(error, FileNotFoundError | FileExistsError):
            raise
        if kind in _NO_CREDENTIALS:
            raise ConfigError(
                f"cannot {what} {place}: this machine has no credentials for it ({kind}); give it "
                f"some where the provider looks (environment, ~/.aws, instance role)"
            ) from error
        if code in _REFUSED:
            raise ConfigError(
                f"cannot {what} {place}: the store refuses this machine's credentials ({code}); "
                f"correct what the provider chain finds (environment, ~/.aws, instance role)"
            ) from error
        if isinstance(error, PermissionError):
            raise ConfigError(
                f"cannot {what} {place}: no permission ({code or kind}); give this machine's "
                f"credentials the right to read and write below {bucket}"
            ) from error
        reason = " ".join(str(error).split()) or kind
        if isinstance(error, ValueError) or "InvalidBucketName" in (kind, code):
            raise ConfigError(
                f"cannot {what} {place}: {reason}; correct the place (execution.root) or the "
                f"environment (AWS_ENDPOINT_URL)"
            ) from error
        raise StoreError(
            f"cannot {what} {place}, tried again and again: {reason}; run again when the store "
            f"answers, finished shards are kept"
        ) from error
