"""Where things are: the settings of one installation, from the environment, `lorafleet.toml` and defaults, in this order.

The home is a folder with everything that is embedded by default: store, MLflow's database, node cache and logs.
"""

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from infra.errors import BadInput
from infra.logs import redact
from infra.strict import StrictModel, parse

FILE_NAME = "lorafleet.toml"
HOME_NAME = ".lorafleet"
PREFIX = "LORAFLEET_"

OTHER_VARIABLES = frozenset(
    {
        "LORAFLEET_NOTIFY_URLS",
        "LORAFLEET_TEST_DATA",
        "LORAFLEET_CRASHPOINT",
        "LORAFLEET_CRASHPOINT_SPENT",
        "LORAFLEET_CRASHPOINT_TRACE",
    }
)
"""Names with our prefix that are no settings: addresses that hear of a night, which are secrets; the others belong to tests."""


class Settings(StrictModel):
    """The settings in force. Picklable; secrets are no settings, they stay in the environment."""

    home: Annotated[Path, Field(strict=False)]
    """Folder for everything that is embedded; absolute."""
    store: str = Field(default_factory=lambda known: str(known["home"] / "store"))
    """Where artifacts are kept: a folder, or s3://bucket/prefix."""
    s3_endpoint_url: str | None = None
    """Address of an S3 server other than AWS; None is AWS."""
    tracking_uri: str = Field(default_factory=lambda known: f"sqlite:///{known['home'] / 'mlflow.db'}")
    """Where MLflow is: a database URI, or the http address of a server."""
    study_storage: str | None = None
    """Database URI for a copy of the studies that Optuna's dashboard can read; None makes no copy."""
    launcher: Literal["ray", "in-process"] = "ray"
    """What runs hosts: Ray, or threads of the driver (for tests and debuggers)."""
    ray_address: str | None = None
    """host:port of a Ray cluster that this machine is a node of; None starts Ray on this machine."""
    lease_seconds: float = Field(default=15.0, gt=0)
    """How long an owner may be silent before others take its claim."""
    orphan_timeout_seconds: float = Field(default=120.0, gt=0)
    """How long a host on an external cluster works on without hearing from a driver."""
    slots_per_host: int = Field(default=16, gt=0)
    """Jobs that share one host, and its base, at most."""
    memory_limit_bytes: int | None = Field(default=None, gt=0)
    """What a host may use for its base, adapters and passes; None is what its machine or accelerator has free."""

    @property
    def cache_dir(self) -> Path:
        """What this node fetched from the store, by hash; may be deleted at any time."""
        return self.home / "cache"

    def public(self) -> dict[str, Any]:
        """Return the settings as JSON data for printing, without passwords in URIs."""
        return {name: redact(value) if isinstance(value, str) else value for name, value in self.model_dump(mode="json").items()}


def load_settings(cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Settings:
    """Find home and read the settings as seen from the folder `cwd` with the variables `env` (default: of this process).

    Home is LORAFLEET_HOME, else what the file says, else the folder `.lorafleet` beside the nearest `lorafleet.toml` or the
    nearest such folder in `cwd` and its parents, else `.lorafleet` in `cwd`. Raises BadInput with one sentence.
    """
    cwd = (cwd or Path.cwd()).absolute()
    variables = _our_variables(os.environ if env is None else env)
    root = next((folder for folder in (cwd, *cwd.parents) if _is_root(folder)), cwd)
    written = _with_absolute_paths(_read_file(root / FILE_NAME), root)
    home = {"home": root / HOME_NAME}
    parse(Settings, home | written, str(root / FILE_NAME))
    for name, text in variables.items():
        # One at a time, so that a mistake is told with the variable's name.
        value = _with_absolute_paths({name: _number_or_text(name, text)}, cwd)
        parse(Settings, home | value, f"environment variable {PREFIX}{name.upper()}")
        written |= value
    return parse(Settings, home | written, "settings")


def _is_root(folder: Path) -> bool:
    return (folder / FILE_NAME).is_file() or (folder / HOME_NAME).is_dir()


def _our_variables(env: Mapping[str, str]) -> dict[str, str]:
    """Return the settings in `env` by field name; an empty variable counts as unset. Raises BadInput for names we do not know."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    found = {name: value for name, value in env.items() if name.startswith(PREFIX) and name not in OTHER_VARIABLES}
    for name in sorted(found.keys() - known):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"Known are {', '.join(sorted(known))}."
        raise BadInput(f"environment variable {name} is no setting. {hint}")
    return {name.removeprefix(PREFIX).lower(): value for name, value in found.items() if value}


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{path} is not valid TOML: {error}; correct it there.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read: {error}; check its permissions and that it is UTF-8 text.") from None


def _with_absolute_paths(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return `values` with home, and a store that is a folder, absolute: relative ones are meant from `folder`."""
    paths = {
        name: str(folder / Path(value).expanduser())
        for name, value in values.items()
        if name in {"home", "store"} and isinstance(value, str) and value and "://" not in value
    }
    return {**values, **paths}


def _number_or_text(name: str, text: str) -> float | str:
    annotation = Settings.model_fields[name].annotation
    numbers: dict[Any, type[float]] = {float: float, int: int, int | None: int}
    try:
        return numbers[annotation](text) if annotation in numbers else text
    except ValueError:
        return text
