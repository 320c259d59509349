"""A host trains real jobs: it commits, resumes, evicts, and ends what cannot train with its reason."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load
from transformers import AutoModelForCausalLM

from infra.errors import BadInput, ObjectNotFound
from tests.workers.jobs import Ground, drain, drive
from workers import layout
from workers.attempt import recorded_end
from workers.job import Job
from workers.metrics_log import decode_points
from workers.report import Checkpointed, Evaluated, Finished, HostEvent, JobEvent


@pytest.fixture
def ground(tmp_path: Path, test_data: Path) -> Iterator[Ground]:
    ground = Ground(tmp_path, test_data)
    yield ground
    ground.close()


SLOTS = 16


def ended(events: Sequence[HostEvent]) -> Finished:
    (finished,) = [event for event in events if isinstance(event, Finished)]
    return finished


def drive_admitted(ground: Ground, job: Job) -> list[JobEvent]:
    host = ground.host()
    host.admit(job)
    return drive(host, job)


def keys_of(ground: Ground, job: Job) -> list[str]:
    prefix = layout.job(job.tenant, job.base.base_id, job.job_id)
    return [info.key.removeprefix(prefix) for info in ground.store.list(prefix)]


def test_a_job_becomes_an_adapter_that_peft_loads_with_the_loss_it_was_measured_with(ground: Ground) -> None:
    job = ground.job()
    finished = ended(drive_admitted(ground, job))
    assert finished.status == "succeeded"
    assert finished.adapter_id is not None
    folder = ground.folder / "store" / layout.adapter("acme", job.base.base_id, finished.adapter_id)
    base = AutoModelForCausalLM.from_pretrained(ground.base, local_files_only=True)
    model = PeftModel.from_pretrained(base, folder).eval()
    renderer = ground.resolver.renderer(job.spec)
    splits, _ = ground.resolver.read(job.spec)
    total, count = 0.0, 0
    for example in renderer.render_all(splits.validation or []):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, :-1].float()
        targets = torch.tensor(
            [token if used else -100 for token, used in zip(example.input_ids, example.supervised, strict=True)]
        )
        total += float(torch.nn.functional.cross_entropy(logits, targets[1:], reduction="sum"))
        count += int((targets[1:] != -100).sum())
    assert total / count == pytest.approx(finished.metrics["eval/loss"], rel=1e-5)


def test_points_stand_once_in_the_chunks_and_nothing_else_is_left(ground: Ground) -> None:
    job = ground.job()
    finished = ended(drive_admitted(ground, job))
    points = [point for chunk in finished.chunks for point in decode_points(ground.store.get(chunk)[0])]
    assert [point.step for point in points if point.metric == "train/loss"] == [1, 2, 3, 4, 5, 6]
    assert [point.step for point in points if point.metric == "eval/loss"] == [2, 4, 6]
    assert not [key for key in keys_of(ground, job) if "checkpoints" in key]


def test_the_same_job_again_is_answered_without_training(ground: Ground) -> None:
    job = ground.job()
    first = ended(drive_admitted(ground, job))
    again = ended(drive_admitted(ground, job))
    assert again.reused
    assert (again.adapter_id, again.metrics) == (first.adapter_id, first.metrics)


@pytest.mark.parametrize("pieces", [1, 2, 3, 5])
def test_a_job_that_was_preempted_anywhere_gives_the_same_adapter(ground: Ground, tmp_path: Path, pieces: int) -> None:
    twin = Ground(tmp_path / "twin", ground.base.parent.parent)
    straight = ended(drive_admitted(twin, twin.job()))
    job, host = ground.job(), ground.host()
    host.admit(job)
    drive(host, job, stop_at=pieces)
    host.evict(job.job_id, "preempted")
    assert ended(host.report()).status == "preempted"
    resumed = ended(drive_admitted(ground, job))
    assert resumed.adapter_id == straight.adapter_id
    assert resumed.metrics == straight.metrics


def test_a_stopped_job_keeps_no_adapter_and_frees_its_seat(ground: Ground) -> None:
    job, host = ground.job(), ground.host()
    host.admit(job)
    (evaluated,) = [event for event in drain(host) if isinstance(event, Evaluated)]
    assert evaluated.step == 2
    host.decide(job.job_id, False)
    assert ended(host.report()).status == "stopped"
    assert host.num_free == SLOTS
    with pytest.raises(ObjectNotFound):
        ground.store.get(layout.manifest("acme", job.base.base_id, "a" * 32))


def test_a_resumed_job_tells_the_evaluation_of_its_checkpoint_again(ground: Ground) -> None:
    job, host = ground.job(), ground.host()
    host.admit(job)
    (told,) = [event for event in drain(host) if isinstance(event, Evaluated)]
    host.evict(job.job_id, "preempted")
    second = ground.host()
    second.admit(job)
    (again,) = [event for event in drain(second) if isinstance(event, Evaluated)]
    assert again == told


def test_a_cancelled_job_that_is_tried_again_has_each_point_once(ground: Ground) -> None:
    job, host = ground.job(), ground.host()
    host.admit(job)
    drive(host, job, stop_at=3)
    host.evict(job.job_id, "cancelled")
    cancelled = ended(host.report())
    assert (cancelled.status, cancelled.num_steps) == ("cancelled", 3)
    finished = ended(drive_admitted(ground, job))
    points = [point for chunk in finished.chunks for point in decode_points(ground.store.get(chunk)[0])]
    assert [point.step for point in points if point.metric == "train/loss"] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_checkpoint_is_not_used_and_the_job_starts_anew_to_the_same_end(ground: Ground, tmp_path: Path) -> None:
    twin = Ground(tmp_path / "twin", ground.base.parent.parent)
    straight = ended(drive_admitted(twin, twin.job()))
    job, host = ground.job(), ground.host()
    host.admit(job)
    drive(host, job, stop_at=3)
    host.evict(job.job_id, "preempted")
    (vectors,) = [key for key in keys_of(ground, job) if key.endswith("state.safetensors")]
    key = layout.job(job.tenant, job.base.base_id, job.job_id) + vectors
    data = bytearray(ground.store.get(key)[0])
    data[-1] ^= 1
    ground.store.put(key, bytes(data))
    resumed = drive_admitted(ground, job)
    assert min(event.step for event in resumed if isinstance(event, Evaluated)) == 2
    assert ended(resumed).adapter_id == straight.adapter_id


def test_an_exploding_job_fails_with_non_finite_and_is_not_tried_again(ground: Ground) -> None:
    job = ground.job(training={"learning_rate": 1e30, "max_grad_norm": 0.0, "max_steps": 20, "eval_steps": None})
    finished = ended(drive_admitted(ground, job))
    assert finished.status == "failed"
    assert finished.reason.startswith("non_finite")
    assert recorded_end(ground.store, job) is not None


def test_generation_measures_exact_match_and_format(ground: Ground) -> None:
    job = ground.job(evaluation={"generate": 4, "max_new_tokens": 8, "format_pattern": "(?s).*"})
    metrics = ended(drive_admitted(ground, job)).metrics
    assert metrics["eval/format_validity"] == 1.0
    assert 0.0 <= metrics["eval/exact_match"] <= 1.0


def test_a_job_continues_from_another_adapter(ground: Ground) -> None:
    first = ended(drive_admitted(ground, ground.job()))
    base_id = ground.job().base.base_id
    ground.resolver.find_adapter = lambda tenant, reference: (base_id, str(first.adapter_id))
    job = ground.job(peft={"init_adapter": "acme.weather@champion"}, training={"max_steps": 2})
    second = drive_admitted(ground, job)
    assert job.init_adapter_id == first.adapter_id
    assert ended(second).metrics["eval/loss"] < first.metrics["eval/loss"] * 1.02


def test_a_job_does_not_continue_an_adapter_that_was_scaled_otherwise(ground: Ground) -> None:
    first = ended(drive_admitted(ground, ground.job()))
    base_id = ground.job().base.base_id
    ground.resolver.find_adapter = lambda tenant, reference: (base_id, str(first.adapter_id))
    job = ground.job(peft={"init_adapter": "acme.weather@champion", "lora_alpha": 16})
    finished = ended(drive_admitted(ground, job))
    assert finished.status == "failed"
    assert finished.reason.startswith("bad_input: the initial adapter scales its update by 2, and peft asks for 8")


def test_a_host_that_closes_lets_go_of_its_job(ground: Ground) -> None:
    job, host = ground.job(), ground.host()
    host.admit(job)
    drive(host, job, stop_at=1)
    host.close()
    assert host.num_free == SLOTS
    assert not [thread for thread in threading.enumerate() if job.job_id in thread.name]


def test_a_job_that_could_not_generate_its_answers_is_refused_before_it_trains(ground: Ground) -> None:
    with pytest.raises(BadInput, match="max_new_tokens"):
        ground.job(evaluation={"generate": 2, "max_new_tokens": 512})
    (ground.folder / "texts").mkdir()
    for split in ("train", "valid"):
        (ground.folder / "texts" / f"{split}.jsonl").write_text(json.dumps({"text": f"Once upon a {split}"}) + "\n")
    with pytest.raises(BadInput, match="generate: 0"):
        ground.job(data={"train": "texts"}, evaluation={"generate": 2})


def test_checkpoints_hold_weights_and_moments_of_one_size(ground: Ground) -> None:
    job, host = ground.job(), ground.host()
    host.admit(job)
    events = drive(host, job, stop_at=3)
    assert [event.step for event in events if isinstance(event, Checkpointed)] == [2]
    (vectors,) = [key for key in keys_of(ground, job) if key.endswith("state.safetensors")]
    tensors = load(ground.store.get(layout.job(job.tenant, job.base.base_id, job.job_id) + vectors)[0])
    assert set(tensors) == {"weights", "first_moment", "second_moment", "best_weights"}
    assert len({tensor.numel() for tensor in tensors.values()}) == 1


def test_a_host_killed_at_a_checkpoint_leaves_a_job_that_another_finishes_at_once(ground: Ground, tmp_path: Path) -> None:
    twin = Ground(tmp_path / "twin", ground.base.parent.parent)
    straight = ended(drive_admitted(twin, twin.job()))
    program = (
        "import sys; from pathlib import Path; from tests.workers.jobs import Ground, drive\n"
        "ground = Ground(Path(sys.argv[1]), Path(sys.argv[2])); host = ground.host(); job = ground.job()\n"
        "host.admit(job); drive(host, job)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program, str(ground.folder), str(ground.base.parent.parent)],
        env={**os.environ, "LORAFLEET_CRASHPOINT": "checkpoint-committed:2"},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    events = drive_admitted(ground, ground.job())
    assert min(event.step for event in events if isinstance(event, Evaluated)) == 4
    assert ended(events).adapter_id == straight.adapter_id


def test_a_job_whose_state_cannot_be_read_ends_with_its_reason_and_the_host_goes_on(ground: Ground) -> None:
    job, host = ground.job(), ground.host()
    ground.store.put(layout.job_state("acme", job.base.base_id, job.job_id), b"{}")
    host.admit(job)
    refused = ended(drain(host))
    assert (refused.status, refused.reason.partition(":")[0]) == ("failed", "error")
    other = ground.job(training={"seed": 1})
    host.admit(other)
    assert ended(drive(host, other)).status == "succeeded"


def test_jobs_of_one_base_with_other_tokenizer_files_are_rendered_each_by_its_own(ground: Ground) -> None:
    plain = ground.job()
    twin = ground.folder / "twin"
    shutil.copytree(ground.base, twin)
    config = json.loads((twin / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    (twin / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    templated = ground.job(base_model={"name_or_path": str(twin)})
    assert templated.base.base_id == plain.base.base_id
    alone = ended(drive_admitted(ground, plain))
    other = Ground(ground.folder / "other", ground.base.parent.parent)
    host = other.host()
    for job in (templated, plain):
        other.resolver.resolve(job.spec)
        host.admit(job)
        finished = ended(drive(host, job))
    assert finished.adapter_id == alone.adapter_id
    assert finished.metrics == alone.metrics
