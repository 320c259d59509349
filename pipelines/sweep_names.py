"""How people name a sweep, and which ones there are. Loads nothing heavy."""

from pathlib import Path

from infra.errors import BadInput
from pipelines.files import load_sweep
from pipelines.workspace import Workspace
from workers import layout


def find_sweep(workspace: Workspace, reference: str) -> tuple[str, str]:
    """Return (tenant, name) of a sweep written as its file, "tenant/name", or a name that one tenant alone has."""
    if reference.endswith((".yaml", ".yml")):
        spec, job, _ = load_sweep(Path(reference))
        return job.tenant, spec.name
    tenant, _, name = reference.partition("/")
    if name and workspace.store.head(layout.sweep_spec(tenant, name)) is not None:
        return tenant, name
    known = list_sweeps(workspace)
    matches = [pair for pair in known if reference in (pair[1], "/".join(pair))]
    if len(matches) == 1:
        return matches[0]
    if matches:
        choices = ", ".join("/".join(pair) for pair in matches)
        raise BadInput(f"'{reference[:80]}' names several sweeps; write one of: {choices}.")
    there = ", ".join("/".join(pair) for pair in known[:10]) or "none yet"
    raise BadInput(f"there is no sweep '{reference[:80]}' in the store {workspace.store.uri}; there is: {there}.")


def list_sweeps(workspace: Workspace) -> list[tuple[str, str]]:
    """Return (tenant, name) of every sweep in the store."""
    found = []
    for info in workspace.store.list("tenants/"):
        parts = info.key.split("/")
        if len(parts) == 5 and parts[2] == "sweeps" and parts[4] == "sweep.json":
            found.append((parts[1], parts[3]))
    return found
