"""`lorafleet schema`: the JSON schema of the files people write, for editors and programs."""

import difflib
from typing import Any

from pydantic import BaseModel

from infra.errors import BadInput
from infra.settings import Settings
from pipelines.gates import GatesFile
from pipelines.nightly.spec import FleetSpec
from sweeps.spec import SweepSpec
from workers.spec import JobSpec

SCHEMAS: dict[str, type[BaseModel]] = {
    "job": JobSpec,
    "sweep": SweepSpec,
    "gates": GatesFile,
    "fleet": FleetSpec,
    "settings": Settings,
}


def schema(name: str | None) -> dict[str, Any]:
    """Return the schema of one kind of file, or of all by name. Raises BadInput for a kind there is not."""
    if name is None:
        return {kind: _schema_of(model) for kind, model in SCHEMAS.items()}
    if name not in SCHEMAS:
        close = difflib.get_close_matches(name, SCHEMAS, n=1)
        hint = f"Did you mean '{close[0]}'?" if close else f"There is: {', '.join(SCHEMAS)}."
        raise BadInput(f"there is no schema '{name[:80]}'. {hint}")
    return _schema_of(SCHEMAS[name])


def _schema_of(model: type[BaseModel]) -> dict[str, Any]:
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}
