"""What the documentation of nights shows can be used as it stands: its YAML, units, manifests, snippets and words."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.strict import parse
from pipelines.files import read_yaml
from pipelines.nightly.records import STATUSES
from pipelines.nightly.spec import CustomerSettings, DefaultsSpec, FleetSpec, LimitsSpec, NotifySpec
from tests.conftest import REPOSITORY

DOCS = (REPOSITORY / "docs" / "nightly.md").read_text()
DEPLOY = REPOSITORY / "infra" / "deploy"
UNITS = ("lorafleet-night.service", "lorafleet-night.timer")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)


def test_the_fleet_of_the_documentation_is_a_fleet(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    (tmp_path / "fleet.yaml").write_text(text)
    fleet = parse(FleetSpec, read_yaml(tmp_path / "fleet.yaml"), "docs/nightly.md")
    assert len(fleet.customers) == 3


@pytest.mark.parametrize("model", [CustomerSettings, DefaultsSpec, LimitsSpec, NotifySpec])
def test_every_key_is_explained(model: Any) -> None:
    assert [
        name
        for name in model.model_fields
        if f"`{name}`" not in DOCS and f"`notify.{name}`" not in DOCS and f"`{name}:" not in DOCS
    ] == []


@pytest.mark.parametrize("model", [CustomerSettings, LimitsSpec])
def test_the_defaults_that_are_told_are_the_defaults(model: Any) -> None:
    told = dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", DOCS, re.MULTILINE))
    for name, field in model.model_fields.items():
        default = [] if field.default_factory else field.default
        assert told[name] == ("null" if default is None else str(default)), name


def test_every_status_is_explained() -> None:
    assert re.findall(rf"^\| ({'|'.join(STATUSES)}) \|", DOCS, re.MULTILINE) == [*STATUSES]


def test_what_links_within_the_repository_is_there() -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", DOCS) if "://" not in link]
    assert links
    assert [link for link in links if not (REPOSITORY / "docs" / link).is_file()] == []


def test_the_snippets_are_python() -> None:
    names = [
        {
            alias
            for node in ast.walk(ast.parse(code))
            if isinstance(node, ast.ImportFrom | ast.Import)
            for alias in (node.names[0].name,)
        }
        for code in blocks("python")
    ]
    assert [bool(found & {"BashOperator", "dagster"}) for found in names] == [True, True]


def manifests() -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes" / "night.yaml").read_text())}


def ray_job() -> dict[str, Any]:
    return dict(yaml.safe_load(manifests()["ConfigMap"]["data"]["rayjob.yaml"]))


def test_the_cron_job_creates_the_ray_job_and_may_do_nothing_else() -> None:
    found = manifests()
    pod = found["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume["configMap"]["name"] for volume in pod["volumes"]}
    folder, _, file = container["command"][-1].rpartition("/")
    assert container["command"][:2] == ["kubectl", "create"]
    assert [volumes[name] for name, path in mounted.items() if path == folder] == [found["ConfigMap"]["metadata"]["name"]]
    assert file in found["ConfigMap"]["data"]
    assert found["Role"]["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}]
    account = found["ServiceAccount"]["metadata"]["name"]
    assert pod["serviceAccountName"] == account == found["RoleBinding"]["subjects"][0]["name"]
    assert found["RoleBinding"]["roleRef"]["name"] == found["Role"]["metadata"]["name"]


def test_the_ray_job_runs_the_night_on_a_cluster_with_a_token_that_ends_with_it() -> None:
    job = ray_job()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["metadata"] == {"generateName": "lorafleet-night-"}, "a fixed name could be created once only"
    assert "lorafleet nightly run /fleet/fleet.yaml" in job["spec"]["entrypoint"]
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_head_and_workers_have_the_ray_and_the_image_of_this_version() -> None:
    cluster = ray_job()["spec"]["rayClusterSpec"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {container["image"] for pod in pods for container in pod["template"]["spec"]["containers"]}
    pinned = re.search(r"^ray==(.*)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    version = re.search(r'^version = "(.*)"$', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    assert pinned is not None
    assert version is not None
    assert cluster["rayVersion"] == pinned[1]
    assert images == {f"YOUR-REGISTRY/lorafleet:{version[1]}"}


def test_no_secret_stands_in_a_manifest() -> None:
    for path in (path for path in DEPLOY.rglob("*") if path.is_file()):
        assert not re.search(r"(SECRET|PASSWORD|TOKEN|NOTIFY_URLS)[A-Z_]*\s*[:=]\s*\S", path.read_text()), path


def test_the_units_are_units(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for name in UNITS:
        # verify asks whether the command is there, so it is given one that is
        text = (DEPLOY / "systemd" / name).read_text()
        (tmp_path / name).write_text(text.replace("/opt/lorafleet/.venv/bin/lorafleet", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--recursive-errors=no", *(str(tmp_path / name) for name in UNITS)],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_timer_fires_once_each_evening_also_where_clocks_change() -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    (when,) = re.findall(r"^OnCalendar=(.*)$", (DEPLOY / "systemd" / UNITS[1]).read_text(), re.MULTILINE)
    asked = ["systemd-analyze", "calendar", "--base-time=2026-10-23", "--iterations=4", when]
    told = subprocess.run(asked, capture_output=True, text=True, check=True, env={"TZ": "UTC", "PATH": "/usr/bin:/bin"}).stdout
    assert re.findall(r"2026-10-\d\d \d\d:\d\d", told) == [
        "2026-10-23 20:00",
        "2026-10-24 20:00",
        "2026-10-25 21:00",
        "2026-10-26 21:00",
    ]
