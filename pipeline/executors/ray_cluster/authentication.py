"""Show a Ray cluster the token it asks for, or say in one line what is missing.

A Ray that was started on a machine with ``~/.ray/auth_token`` asks for it, and ``ray.init`` writes
that file. Of its own accord Ray shows the token to a cluster that it finds by itself, and to none
that it is given the address of.
"""

import os
from collections.abc import Callable

import grpc
from ray._private.authentication.authentication_token_setup import _enable_token_auth
from ray._private.grpc_utils import init_grpc_channel
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError

from schemas.errors import ConfigError

# Questions that cost nothing and are answered to who shows the token: by the head, to its clients.
HEAD, CLIENTS = "/ray.rpc.NodeInfoGcsService/GetClusterId", "/ray.rpc.RayletDriver/ClusterInfo"


def show_token(cluster: str, is_refused: Callable[[], bool]) -> None:
    """Have Ray show this machine's token from here on, if ``cluster`` asks for one.

    ``is_refused`` asks the cluster something and returns whether a token is missing or wrong.
    Raises ConfigError where the right one is not here.
    """
    if not is_refused():
        return
    asks = f"{cluster} asks for a token"
    if (mode := os.environ.get("RAY_AUTH_MODE", "token")).lower() != "token":
        raise ConfigError(f"{asks}, and RAY_AUTH_MODE is {mode} here: unset it, or set it to token")
    try:
        is_there = AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    except AuthenticationError as error:
        path = os.environ.get("RAY_AUTH_TOKEN_PATH")
        raise ConfigError(
            f"{asks}, and the file that RAY_AUTH_TOKEN_PATH names, {path}, is empty or cannot be "
            f"read"
        ) from error
    if not is_there:
        raise ConfigError(
            f"{asks} and there is none here: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file "
            f"that holds it, or copy ~/.ray/auth_token from the cluster's head"
        )
    _enable_token_auth()
    if is_refused():
        raise ConfigError(
            f"{asks}, and the one here is another: it is looked for in RAY_AUTH_TOKEN, the file "
            f"that RAY_AUTH_TOKEN_PATH names, and ~/.ray/auth_token, in this order"
        )


def refuses_us(address: str, timeout_s: float) -> bool:
    """Whether a driver's or client's address is refused us for a token, missing or wrong."""
    method = CLIENTS if address.startswith("ray://") else HEAD
    try:
        with init_grpc_channel(address.removeprefix("ray://")) as channel:
            channel.unary_unary(method)(b"", timeout=timeout_s)
    except AuthenticationError:  # Ray itself misses the token that it is told to show
        return True
    except grpc.RpcError as error:  # any other answer is one to whom it knows
        return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False
