"""How lorafleet talks to MLflow at all: the client, silent and bounded in time, and the translation of its errors.

Importing this module imports MLflow: 1.7 s, whatever part of it is asked for, since its package pulls in pandas, pyarrow and
fastapi. So it is imported only where something is tracked or registered. The embedded database is a SQLite file; its schema
is created under a file lock, since MLflow's own creation is not safe for two processes.
"""

import fcntl
import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from infra.errors import BadInput, ServiceUnavailable, WorkFailed
from infra.tracking import without_credentials

# Read by MLflow at each call, some already at import. Retries: its client repeats POST, which makes twins; ours search first.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_DISABLE_AGENT_HINT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow.utils.rest_utils  # noqa: E402
from mlflow import MlflowClient  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.utils.credentials import get_default_host_creds  # noqa: E402

# Every error is raised to us as well and becomes a sentence; alembic reports each migration of a new database.
logging.getLogger("mlflow").setLevel(logging.CRITICAL)
logging.getLogger("alembic").setLevel(logging.WARNING)

CHECK_TIMEOUT_SECONDS = 3

_FINAL_CODES = frozenset(
    {
        "ALREADY_EXISTS",
        "BAD_REQUEST",
        "INVALID_PARAMETER_VALUE",
        "MALFORMED_REQUEST",
        "NOT_FOUND",
        "RESOURCE_ALREADY_EXISTS",
        "RESOURCE_DOES_NOT_EXIST",
    }
)
"""What MLflow answers when asking again is of no use; a connection that failed is INTERNAL_ERROR."""

Item = TypeVar("Item")


class MlflowRefused(WorkFailed):
    """MLflow answered that it will not do this. `code` is MLflow's word for the reason."""

    def __init__(self, sentence: str, code: str = "") -> None:
        super().__init__(sentence, code)

    @property
    def code(self) -> str:
        return str(self.args[1])

    def __str__(self) -> str:
        return str(self.args[0])


class Mlflow:
    """One MLflow, embedded (`sqlite:///<file>`) or a server (`http(s)://`). Nothing is opened before the first use.

    Raises BadInput if `tracking_uri` is neither.
    """

    def __init__(self, tracking_uri: str) -> None:
        self.uri = without_credentials(tracking_uri)
        self._tracking_uri = tracking_uri
        self._client: MlflowClient | None = None
        self.database = _database_of(tracking_uri, self.uri)
        """The file of the embedded MLflow; None for a server."""

    @contextmanager
    def client(self) -> Iterator[MlflowClient]:
        """Give MLflow's client; what it raises inside becomes ServiceUnavailable (does not answer) or MlflowRefused."""
        try:
            if self._client is None:
                self._client = self._open()
            yield self._client
        except MlflowException as error:
            raise self._translated(error) from error
        except FileNotFoundError:
            raise
        except OSError as error:
            if isinstance(error, ServiceUnavailable):
                raise
            raise self._unavailable(error) from error

    def check(self) -> None:
        """Return if MLflow answers, within seconds, to who we are; raise ServiceUnavailable if not."""
        if self.database is None:
            self._check_server()
        with self.client() as client:
            client.search_experiments(max_results=1)

    def _check_server(self) -> None:
        try:
            mlflow.utils.rest_utils.http_request(
                get_default_host_creds(self._tracking_uri), "/health", "GET", max_retries=0, timeout=CHECK_TIMEOUT_SECONDS
            )
        except (MlflowException, OSError) as error:
            raise self._unavailable(error) from error

    def _open(self) -> MlflowClient:
        if self.database is None:
            return MlflowClient(self._tracking_uri, registry_uri=self._tracking_uri)
        try:
            return self._open_embedded(self.database)
        except Exception as error:  # SQLAlchemy's and alembic's own come through here; all say that the file is of no use
            raise self._unavailable(error) from error

    def _open_embedded(self, database: Path) -> MlflowClient:
        database.parent.mkdir(parents=True, exist_ok=True)
        with database.with_name(f"{database.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _configure_models()
            client = MlflowClient(self._tracking_uri, registry_uri=self._tracking_uri)
            client.search_experiments(max_results=1)
            client.search_registered_models(max_results=1)
        return client

    def _translated(self, error: MlflowException) -> ServiceUnavailable | MlflowRefused:
        if error.error_code in _FINAL_CODES:
            reason = self._clean(error).removeprefix(f"{error.error_code}: ")
            return MlflowRefused(f"MLflow at {self.uri} refused this: {reason}", error.error_code)
        return self._unavailable(error)

    def _unavailable(self, error: Exception) -> ServiceUnavailable:
        if self.database is not None:
            return ServiceUnavailable(
                f"The embedded MLflow database {self.database} cannot be used ({self._clean(error)}); "
                "free or repair its disk, or name another home."
            )
        if isinstance(error, MlflowException) and error.error_code in (
            "PERMISSION_DENIED",
            "UNAUTHENTICATED",
            "CUSTOMER_UNAUTHORIZED",
        ):
            return ServiceUnavailable(
                f"MLflow at {self.uri} refuses these credentials; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD "
                "(or MLFLOW_TRACKING_TOKEN)."
            )
        return ServiceUnavailable(
            f"MLflow at {self.uri} does not answer; start it, or unset tracking_uri to use the embedded one."
        )

    def _clean(self, error: Exception) -> str:
        """The first line of what an error says, short and without credentials."""
        lines = str(error).replace(self._tracking_uri, self.uri).splitlines() or [type(error).__name__]
        return lines[0][:300].rstrip(". ")


def all_pages(search: Callable[[str | None], Any]) -> Iterator[Item]:
    """Yield the items of all pages of one of MLflow's searches; `search` is called with each page token."""
    token: str | None = None
    while True:
        page = search(token)
        yield from page
        token = page.token
        if not token:
            return


def cut(values: dict[str, str], key_length: int, value_length: int) -> dict[str, str]:
    """Cut keys and values to the lengths that MLflow takes."""
    return {str(key)[:key_length]: str(value)[:value_length] for key, value in values.items()}


def quoted(value: str) -> str:
    """Return `value` as a literal of MLflow's search language, which has no escapes; BadInput if it would need one."""
    if "'" in value or "\\" in value:
        raise BadInput(f"{value!r} cannot be searched for in MLflow; leave out quotes and backslashes.")
    return f"'{value}'"


def _configure_models() -> None:
    """Have SQLAlchemy set up MLflow's tables now, without the deprecation that MLflow 3.17 causes there (elsewhere an error)."""
    import sqlalchemy.orm

    importlib.import_module("mlflow.store.db.utils")  # brings all tables; not needed for a server
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The ``noload`` loader strategy", category=DeprecationWarning)
        sqlalchemy.orm.configure_mappers()


def _database_of(tracking_uri: str, shown: str) -> Path | None:
    scheme = urlsplit(tracking_uri).scheme
    path = tracking_uri.removeprefix("sqlite:///").partition("?")[0]
    if scheme == "sqlite" and tracking_uri.startswith("sqlite:///") and path and path != ":memory:":
        return Path(path).absolute()
    if scheme in ("http", "https"):
        return None
    raise BadInput(
        f"tracking_uri must be http(s)://<server> or sqlite:///<file>, got {shown!r}; MLflow keeps runs in no other way."
    )
