"""Joining a Ray cluster, or starting one on this machine, within seconds and without a word of Ray's own.

Ray answers a wrong address after two minutes with lines of its own on stderr, and binds a local cluster to every
network interface. Here the address is tried first, and what is started listens on loopback only, behind a token.
"""

import contextlib
import functools
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator

import grpc
import ray
from ray._private import ray_constants
from ray._private import worker as ray_worker
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

from infra.errors import BadInput, ServiceUnavailable

CONNECT_SECONDS = 3.0
"""How long a Ray address may take to answer."""

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE

OBJECT_STORE_BYTES = 200 * 2**20
"""Shared memory of a Ray started here. Messages are small and artifacts go through the store, so little is needed."""

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""No report to Ray's makers, and no FutureWarning about the accelerators of zero-GPU actors."""


@functools.cache
def _own_token() -> str:
    """Return this process's token: one for its life, since Ray keeps the first one it sees, whatever the environment says."""
    return secrets.token_hex(32)


def start_local(num_cpus: int) -> None:
    """Start Ray on this machine for this process; it ends with it, however that happens. Raises ServiceUnavailable.

    After a SIGKILL of this process the tasks are gone in about four seconds; two idle agents of Ray's take up to a minute.

    The token is made for this process and travels to Ray's processes in their environment, so nothing is written to HOME.
    """
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = _own_token()
    # Whoever asked a cluster before may have read another one, from a file in HOME.
    AuthenticationTokenLoader.instance().reset_cache()
    with _quiet_environment(), _loopback_only(), _keep_sigterm_handler():
        try:
            ray.init(
                "local",
                num_cpus=num_cpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (RuntimeError, OSError, ray.exceptions.RayError, ValueError) as error:
            raise ServiceUnavailable(
                f"Ray could not be started on this machine ({_first_line(error)}); see /tmp/ray/session_latest/logs, or set "
                "launcher = 'in-process'."
            ) from error


def connect(address: str) -> None:
    """Connect this process to the cluster at `address` (host:port). Raises BadInput or, within seconds, ServiceUnavailable."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise BadInput(
            f"ray_address must be the host:port of a cluster that this machine is a node of, got {address!r}; "
            "'ray start --head' prints it."
        )
    listens_on_loopback = _listens_on_loopback(host, port)
    if not listens_on_loopback:
        _check_cluster(address)
    place = _loopback_only() if listens_on_loopback else contextlib.nullcontext()
    with _quiet_environment(), place, _keep_sigterm_handler():
        # Ray looks for a token by itself only where it was given no address.
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except (RuntimeError, OSError, ray.exceptions.RayError, ValueError) as error:
            raise ServiceUnavailable(f"Ray at {address} cannot be used from here: {_first_line(error)}.") from error


def _listens_on_loopback(host: str, port: str) -> bool:
    """Tell whether the cluster meant by a loopback address listens there only.

    Ray replaces a loopback address by this machine's public one, where such a cluster does not listen.
    """
    if host not in {"127.0.0.1", "localhost"} or _refusal(f"{ray.util.get_node_ip_address()}:{port}") != UNAVAILABLE:
        return False
    _check_cluster(f"{host}:{port}")
    return True


def _check_cluster(address: str) -> None:
    """Raise ServiceUnavailable unless a Ray cluster answers at `address` and takes this machine's token."""
    match _refusal(address):
        case None:
            return
        case grpc.StatusCode.UNAUTHENTICATED:
            raise ServiceUnavailable(
                f"Ray at {address} does not accept this machine's token; put the cluster's token into RAY_AUTH_TOKEN or "
                "the file that RAY_AUTH_TOKEN_PATH names."
            )
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED:
            raise ServiceUnavailable(
                f"Ray at {address} does not answer; start it with 'RAY_AUTH_MODE=token ray start --head --port "
                f"{address.rpartition(':')[2]}', or unset ray_address to have Ray started on this machine."
            )
        case code:
            raise ServiceUnavailable(f"What answers at {address} is not Ray ({code.name}); set ray_address to a Ray cluster.")


def _refusal(address: str) -> grpc.StatusCode | None:
    """Ask the cluster at `address` for its id, as Ray's own client does first; return why it did not tell, None if it did."""
    loader = AuthenticationTokenLoader.instance()
    loader.reset_cache()
    token = tuple(loader.get_token_for_http_header(ignore_auth_mode=True).items())
    with grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        try:
            # A closed port says so at once, which gRPC takes as a reason to try again.
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
            grpc.channel_ready_future(channel).result(timeout=CONNECT_SECONDS)
            ask(b"", metadata=token, timeout=CONNECT_SECONDS)
        except (OSError, grpc.FutureTimeoutError):
            return UNAVAILABLE
        except grpc.RpcError as error:
            return error.code()
    return None


@contextlib.contextmanager
def _quiet_environment() -> Iterator[None]:
    """Set `_ENVIRONMENT`, where nothing is set, while Ray starts; its processes inherit it.

    `log_to_driver=False` leaves Ray printing a paragraph to stdout whenever a process dies. Its debugger uses this switch for
    that too; the same text reaches our log with the task's exit.
    """
    ray_worker._worker_logs_enabled = False
    logging.getLogger("ray").setLevel(logging.ERROR)
    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Let the Ray that starts meanwhile listen on loopback only.

    Ray 2.60 replaces `_node_ip_address="127.0.0.1"` by a public address and binds to all interfaces, except where it
    believes it cannot form clusters (its default on macOS and Windows). This switches that belief, here and in its processes.
    """
    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    environment = os.environ.get(name)
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        os.environ.pop(name)
        if environment is not None:
            os.environ[name] = environment


@contextlib.contextmanager
def _keep_sigterm_handler() -> Iterator[None]:
    """Put back a SIGTERM handler of ours, which `ray.init` replaces with one that exits."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if main and callable(before):
            signal.signal(signal.SIGTERM, before)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
