"""What people write to ask for a night: fleet.yaml, its models, and what can be told from the files alone.

Reading a fleet loads neither torch nor boto3, and asks no store: who its customers are is found by `customers`.
"""

import glob
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import ConfigDict, Discriminator, Field, Tag, field_validator

from infra.errors import BadInput
from infra.strict import StrictModel, parse
from pipelines.files import load_sweep, read_yaml
from pipelines.gates import load_gates
from pipelines.nightly.job_template import JobTemplate, load_template
from pipelines.nightly.signatures import TENANT
from workers.spec import Name, Positive

URLS_ENV = "LORAFLEET_NOTIFY_URLS"
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class ResweepSpec(StrictModel):
    """A new search for hyper-parameters where the gates keep refusing."""

    after_rejections: Positive = Field(3, description="Rejections in a row after which a sweep is run.")
    sweep: str = Field(min_length=1, description="The sweep's file; its job is replaced by the customer's.")


class CustomerSettings(StrictModel):
    """How a customer is trained and judged."""

    priority: Annotated[int, Field(ge=0, le=100)] = Field(50, description="Higher goes first.")
    recipe: str | None = Field(
        None, description="tenant/sweep: peft and training are those of that sweep's best trial; None: those of the job."
    )
    min_new_rows: Annotated[int, Field(ge=0)] = Field(20, description="Fewer new rows than this do not start a training.")
    max_age_days: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Days after the last training from when on any new row starts one; None: min_new_rows alone decides."
    )
    warm_start: Literal["champion", "none"] = Field("champion", description="What training continues from.")
    gates: str | None = Field("gates.yaml", description="The gates' file; None: gates.yaml in the home, if there is one.")
    pin: str | None = Field(None, description="Adapter that stays champion: nothing is trained or promoted; None: none does.")
    holdout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.1, description="Share of rows, chosen by the hash of their prompts, that is never trained on: challenger, champion and "
        "base are compared on it. Without effect where the data has test rows of its own."
    )  # fmt: skip
    resweep: ResweepSpec | None = Field(None, description="Search anew where the gates keep refusing; None: never.")
    min_rows: Positive = Field(20, description="A customer with fewer rows is held.")
    max_drop: Share = Field(0.9, description="A customer who lost a larger share of its rows since the last training is held.")
    max_quarantined: Share = Field(0.2, description="A customer with a larger share of bad rows is held.")


class DefaultsSpec(CustomerSettings):
    """What holds for every customer that says nothing else."""

    job: str = Field("job.yaml", min_length=1, description="The template of every job; its tenant and data are replaced.")
    task: Name | None = Field(None, description="The task of customers that name none; None: that of the job.")


def _without_defaults(schema: dict[str, Any]) -> None:
    for described in schema["properties"].values():
        described.pop("default", None)


class _Entry(CustomerSettings):
    """What an entry of customers leaves out is as `defaults` say."""

    model_config = ConfigDict(json_schema_extra=_without_defaults)

    task: Name | None = Field(None, description="The task; left out: that of the defaults.")
    set: dict[str, Any] = Field(
        default_factory=dict, description="Values put into the job by path, such as training.num_train_epochs: 3."
    )

    @property
    def given(self) -> dict[str, Any]:
        """The settings that are written in this entry, by name."""
        return {name: getattr(self, name) for name in self.model_fields_set if name in CustomerSettings.model_fields}


class ListedSpec(_Entry):
    """One customer. Where it is discovered or stands in a CSV file too, what is written here has precedence."""

    tenant: Name = Field(description="The customer.")
    data: str | None = Field(
        None, min_length=1, description="Its rows: a file, a glob, a folder, or these under s3://; None: where it is discovered."
    )


class DiscoverSpec(_Entry):
    """All customers whose data lies where a pattern says."""

    discover: str = Field(description="A folder or file with {tenant} in its path, local or s3://; one listing finds all.")
    exclude: list[str] = Field(default_factory=list, description="Tenants that are left out; names, or patterns such as test-*.")

    @field_validator("discover")
    @classmethod
    def _names_a_tenant(cls, pattern: str) -> str:
        rest = pattern.replace(TENANT, "", 1)
        if rest == pattern or TENANT in rest or glob.has_magic(rest) or "{" in rest:
            raise ValueError(
                f"{pattern!r} should hold {TENANT} once and no other wildcard, such as s3://bucket/customers/{TENANT}/"
            )
        if pattern.startswith("s3://") and not re.match(r"s3://[^/{]+/", pattern):
            raise ValueError(f"{pattern!r} should name a bucket before {TENANT}, such as s3://bucket/customers/{TENANT}/")
        return pattern


class CsvSpec(_Entry):
    """Customers of a table; what a cell leaves empty is as this entry or `defaults` say."""

    csv: str = Field(
        min_length=1,
        description="A local CSV file with the columns tenant and data, and any of priority, task, pin, set.<path in the job>.",
    )


def _form_of(entry: Any) -> str:
    keys: Any = entry if isinstance(entry, dict) else dict(entry) if isinstance(entry, StrictModel) else {}
    return "discovered customers" if "discover" in keys else "a table of customers" if "csv" in keys else "a customer"


CustomersEntry = Annotated[
    Annotated[ListedSpec, Tag("a customer")]
    | Annotated[DiscoverSpec, Tag("discovered customers")]
    | Annotated[CsvSpec, Tag("a table of customers")],
    Discriminator(_form_of),
]


class LimitsSpec(StrictModel):
    """How far a night may go."""

    max_promotions_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        0.25, description="Share of the champions that one night may replace; first champions do not count; None: all."
    )
    gpu_hours: Annotated[float, Field(gt=0)] | None = Field(None, description="Accelerator-hours of a night; None: no limit.")
    deadline: str | None = Field(
        None, description="Time of day, as 06:00, at which the rest is checkpointed for the next night; None: there is none."
    )
    timezone: str = Field("UTC", description="Of the deadline and of the dates that name nights, such as Europe/Berlin.")
    canary: list[Name] = Field(default_factory=list, description="Tenants that go first.")
    max_canary_failures: Share = Field(
        0.5, description="If a larger share of the canaries fails or is rejected, the others are not trained this night."
    )

    @field_validator("deadline")
    @classmethod
    def _is_a_time_of_day(cls, text: str | None) -> str | None:
        if text is not None and re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", text) is None:
            raise ValueError(f"{text!r} is no time of day; write hours and minutes, such as 06:00")
        return text

    @field_validator("timezone")
    @classmethod
    def _is_known(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(f"{name[:80]!r} is no time zone known here; write UTC, or a name such as Europe/Berlin") from None
        return name


class NotifySpec(StrictModel):
    """Who hears of a night. The addresses are secrets, so they stand in the environment."""

    on: Literal["always", "problems"] = Field("always", description="Every night, or only where something failed or is held.")
    urls_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = Field(
        URLS_ENV, description="Name of the environment variable that holds the addresses."
    )


class FleetSpec(StrictModel):
    """All customers of one fleet and what their nights may do."""

    name: Name = Field(description="Name of the fleet; its nights are kept under it.")
    defaults: DefaultsSpec = Field(default_factory=lambda: DefaultsSpec(), description="What holds for every customer.")
    customers: list[CustomersEntry] = Field(min_length=1, description="Customers: listed, discovered, or in a CSV file.")
    limits: LimitsSpec = Field(default_factory=lambda: LimitsSpec(), description="How far a night may go.")
    notify: NotifySpec | None = Field(None, description="Who hears of a night; None: nobody.")


@dataclass(frozen=True)
class Fleet:
    """A fleet.yaml as read, and what it names: all of it is known to be there and to be sound."""

    spec: FleetSpec
    path: Path
    template: JobTemplate

    @property
    def folder(self) -> Path:
        """Where relative paths in the file start."""
        return self.path.parent

    def task_of(self, entry: _Entry) -> str:
        """Return the task of an entry's customers."""
        return entry.task or self.spec.defaults.task or self.template.task


def load_fleet(path: Path) -> Fleet:
    """Read a fleet and every file it names, except tables of customers and data.

    Raises BadInput with one sentence: a wrong key, an override that makes no job, a gates or sweep file that is not one, a
    customer who is listed twice.
    """
    spec = parse(FleetSpec, _read(path), str(path))
    fleet = Fleet(spec, path, load_template(path.parent / spec.defaults.job))
    _check_tasks(fleet)
    for where, settings in _settings_in(spec):
        _check_files(fleet, settings, f"{path}: {where}")
        if isinstance(settings, _Entry):
            fleet.template.check(settings.set, f"{path}: {where}.set", fleet.folder)
    return fleet


def _read(path: Path) -> Mapping[str, Any]:
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise BadInput(f"{path} should be a fleet as 'key: value' lines, see 'lorafleet schema fleet'.")
    if "base_model" in raw or "space" in raw:
        what, command = ("job", "lorafleet train") if "base_model" in raw else ("sweep", "lorafleet sweep run")
        raise BadInput(f"{path} is a {what}, expected a fleet; run it with '{command}', or name it in a fleet's file.")
    return raw


def _settings_in(spec: FleetSpec) -> Iterator[tuple[str, CustomerSettings]]:
    yield "defaults", spec.defaults
    yield from ((f"customers.{number}", entry) for number, entry in enumerate(spec.customers))


def _check_tasks(fleet: Fleet) -> None:
    """Raise BadInput unless every entry has a task, and no customer is listed twice."""
    seen: set[tuple[str, str]] = set()
    for number, entry in enumerate(fleet.spec.customers):
        if not fleet.task_of(entry):
            raise BadInput(f"{fleet.path}: customers.{number} has no task; add defaults.task, or one to {fleet.template.path}.")
        if isinstance(entry, ListedSpec):
            key = (entry.tenant, fleet.task_of(entry))
            if key in seen:
                twice = f"customers.{number} lists {'.'.join(key)} a second time"
                raise BadInput(f"{fleet.path}: {twice}; keep one, or give it a task of its own.")
            seen.add(key)


def _check_files(fleet: Fleet, settings: CustomerSettings, where: str) -> None:
    """Raise BadInput unless the files that these settings name are what they should be."""
    written = settings.model_fields_set if isinstance(settings, _Entry) else set(CustomerSettings.model_fields)
    try:
        if settings.gates is not None and "gates" in written:
            if not (fleet.folder / settings.gates).exists():
                without = "write the gates there (see 'lorafleet schema gates'), or set gates to null"
                raise BadInput(f"there is no file {fleet.folder / settings.gates}; {without}.")
            load_gates(fleet.folder / settings.gates).check_files()
        if settings.resweep is not None:
            load_sweep(fleet.folder / settings.resweep.sweep)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
