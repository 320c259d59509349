"""The only place that spells keys (DESIGN §6). Every part is a checked name or an id; none comes from data."""

from infra.errors import BadInput
from infra.fingerprint import is_id
from workers.spec import check_name


def _name(name: str) -> str:
    try:
        return check_name(name)
    except ValueError as error:
        raise BadInput(f"{error}.") from None


def _id(text: str) -> str:
    if not is_id(text):
        raise BadInput(f"{text[:80]!r} is not an id (32 characters of a-z and 2-7).")
    return text


def base(base_id: str) -> str:
    return f"bases/{_id(base_id)}/base.json"


def bases() -> str:
    return "bases/"


def base_files(base_id: str) -> str:
    return f"bases/{_id(base_id)}/files/"


def tenants() -> str:
    return "tenants/"


def tenant(tenant: str) -> str:
    return f"tenants/{_name(tenant)}/"


def data(tenant_: str, digest: str) -> str:
    return f"{tenant(tenant_)}data/{_id(digest)}/"


def quarantine(tenant_: str, digest: str) -> str:
    """The list of a night's bad rows: places and what is wrong, none of the text."""
    return f"{tenant(tenant_)}quarantine/{_id(digest)}.jsonl"


def jobs(tenant_: str, base_id: str) -> str:
    return f"{tenant(tenant_)}{_id(base_id)}/jobs/"


def job(tenant_: str, base_id: str, job_id: str) -> str:
    return f"{jobs(tenant_, base_id)}{_id(job_id)}/"


def job_spec(tenant_: str, base_id: str, job_id: str) -> str:
    return f"{job(tenant_, base_id, job_id)}spec.json"


def job_state(tenant_: str, base_id: str, job_id: str) -> str:
    return f"{job(tenant_, base_id, job_id)}state.json"


def job_cancel(tenant_: str, base_id: str, job_id: str) -> str:
    return f"{job(tenant_, base_id, job_id)}cancel.json"


def attempt(tenant_: str, base_id: str, job_id: str, epoch: int) -> str:
    return f"{job(tenant_, base_id, job_id)}attempts/{epoch:06d}/"


def adapter(tenant_: str, base_id: str, adapter_id: str) -> str:
    return f"{tenant(tenant_)}{_id(base_id)}/adapters/{_id(adapter_id)}/"


def manifests(tenant_: str, base_id: str) -> str:
    return f"{tenant(tenant_)}{_id(base_id)}/manifests/"


def manifest(tenant_: str, base_id: str, adapter_id: str) -> str:
    return f"{manifests(tenant_, base_id)}{_id(adapter_id)}.json"


def tombstone(tenant_: str, base_id: str, adapter_id: str) -> str:
    return f"{tenant(tenant_)}{_id(base_id)}/tombstones/{_id(adapter_id)}.json"


def parts_of_job_state(key: str) -> tuple[str, str, str] | None:
    """Return (tenant, base_id, job_id) of a job state's key, None for any other key."""
    match key.split("/"):
        case ["tenants", tenant_, base_id, "jobs", job_id, "state.json"] if is_id(base_id) and is_id(job_id):
            return tenant_, base_id, job_id
        case _:
            return None


def parts_of_manifest(key: str) -> tuple[str, str, str] | None:
    """Return (tenant, base_id, adapter_id) of a manifest's key, None for any other key."""
    match key.split("/"):
        case ["tenants", tenant_, base_id, "manifests", file] if is_id(base_id) and is_id(file.removesuffix(".json")):
            return tenant_, base_id, file.removesuffix(".json")
        case _:
            return None


def evidence_of(tenant_: str, adapter_id: str) -> str:
    return f"{tenant(tenant_)}evidence/{_id(adapter_id)}/"


def evidence(tenant_: str, adapter_id: str, digest: str) -> str:
    return f"{evidence_of(tenant_, adapter_id)}{_id(digest)}.json"


def sweeps(tenant_: str) -> str:
    return f"{tenant(tenant_)}sweeps/"


def sweep(tenant_: str, name: str) -> str:
    return f"{sweeps(tenant_)}{_name(name)}/"


def sweep_spec(tenant_: str, name: str) -> str:
    return f"{sweep(tenant_, name)}sweep.json"


def sweep_claim(tenant_: str, name: str) -> str:
    return f"{sweep(tenant_, name)}claim.json"


def sweep_settings(tenant_: str, name: str) -> str:
    return f"{sweep(tenant_, name)}settings.json"


def sweep_stop(tenant_: str, name: str) -> str:
    return f"{sweep(tenant_, name)}stop.json"


def sweep_packs(tenant_: str, name: str) -> str:
    return f"{sweep(tenant_, name)}packs.json"


def trials(tenant_: str, name: str) -> str:
    return f"{sweep(tenant_, name)}trials/"


def trial(tenant_: str, name: str, number: int) -> str:
    return f"{trials(tenant_, name)}{number:06d}.json"


def model(tenant_: str, task: str) -> str:
    return f"{tenant(tenant_)}models/{_name(task)}/"


def candidate(tenant_: str, task: str, adapter_id: str) -> str:
    return f"{model(tenant_, task)}candidates/{_id(adapter_id)}.json"


def journal(tenant_: str, task: str, generation: int) -> str:
    return f"{model(tenant_, task)}journal/{generation:06d}.json"


def head(tenant_: str, task: str) -> str:
    return f"{model(tenant_, task)}HEAD"


def fleets() -> str:
    return "fleets/"


def fleet(name: str) -> str:
    return f"fleets/{_name(name)}/"


def fleet_claim(name: str) -> str:
    return f"{fleet(name)}claim.json"


def nights(fleet_name: str) -> str:
    return f"{fleet(fleet_name)}nights/"


def night(fleet_name: str, night_: str) -> str:
    return f"{nights(fleet_name)}{_name(night_)}/"


def night_file(fleet_name: str, night_: str, file: str) -> str:
    """`file` is one of ours: night.json, outcomes.json, report.json, page.html."""
    return f"{night(fleet_name, night_)}{file}"


def night_plan(fleet_name: str, night_: str, tenant_: str, task: str) -> str:
    return f"{night(fleet_name, night_)}plans/{_name(tenant_)}.{_name(task)}.json"


def night_row(fleet_name: str, night_: str, tenant_: str, task: str) -> str:
    return f"{night(fleet_name, night_)}rows/{_name(tenant_)}.{_name(task)}.json"


def forgotten_tenants() -> str:
    return "forgotten/"


def forgotten(tenant_: str) -> str:
    """The tombstone of a tenant whose objects were removed; it names nothing of what was there."""
    return f"forgotten/{_name(tenant_)}.json"
