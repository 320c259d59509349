"""One sweep on all that a team would run it on: an S3 server, an MLflow server over PostgreSQL, an external Ray cluster."""

from collections import Counter
from pathlib import Path

import pytest

from tests.contracts.storage_servers import S3Server, require
from tests.end_to_end.ground import SWEEP, TENANT, ground_in
from tests.end_to_end.mlflow_view import children, runs_in
from tests.end_to_end.services import mlflow_on, postgres, ray_head

REPOSITORY = str(Path(__file__).parents[2])


@pytest.mark.faults  # for its length: three services start
@pytest.mark.timeout(900)
def test_sweep_runs_on_s3_and_mlflow_over_postgresql_and_an_external_ray_cluster(
    tmp_path: Path, test_data: Path, moto: S3Server
) -> None:
    require("psycopg2")
    bucket = moto.new_bucket()
    # Nodes and the MLflow server bring their own credentials (here the AWS_* variables of this process); hosts find lorafleet
    # installed, or here on the path.
    (tmp_path / "postgres").mkdir()
    with (
        postgres(tmp_path / "postgres") as database,
        mlflow_on(database, f"s3://{bucket}/mlflow", tmp_path, {"MLFLOW_S3_ENDPOINT_URL": moto.url}) as mlflow,
        ray_head(2, {"PYTHONPATH": REPOSITORY, "OMP_NUM_THREADS": "1"}) as cluster,
    ):
        settings = {
            "LORAFLEET_S3_ENDPOINT_URL": moto.url,
            "LORAFLEET_TRACKING_URI": mlflow,
            "LORAFLEET_RAY_ADDRESS": cluster.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": cluster.token,
        }
        store = f"s3://{bucket}/lorafleet"
        with ground_in(tmp_path / "ground", environment=settings, store=store, endpoint_url=moto.url) as ground:
            ground.write_sweep(test_data)
            done = ground.run("sweep", "run", "sweep.yaml")
            assert done.code == 0, done.err
            assert Counter(trial.status for trial in ground.trials()) == {"complete": 4}
            promoted = ground.run("promote", f"{TENANT}.weather@challenger")
            assert promoted.code == 0, promoted.err
            keys = [found["Key"] for found in moto.client.list_objects_v2(Bucket=bucket)["Contents"]]
            runs = runs_in(mlflow)
    assert not (ground.home / "store").exists()
    assert not (ground.home / "mlflow.db").exists()
    assert sum(key.startswith(f"lorafleet/tenants/{TENANT}/sweeps/{SWEEP}/trials/") for key in keys) == 4
    assert {run.status for run in runs} == {"FINISHED"}
    assert sorted(children(runs)) == [0, 1, 2, 3]
    (parent,) = [run for run in runs if run.name == SWEEP]
    assert any(key.startswith("mlflow/") and parent.run_id in key and key.endswith(".html") for key in keys)
