"""Many jobs on one host: each ends as if it were alone, whatever happens to the others."""

from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.claims import Owner
from infra.errors import BadInput
from infra.records import decode_record
from tests.workers.jobs import Ground, drain, drive
from workers import layout
from workers.attempt import RECORD_FORMAT, Attempt
from workers.engine.pack import Pack
from workers.engine.training import Training
from workers.host import EngineHost
from workers.host_passes import HostBroken
from workers.job import Job
from workers.memory import bank_bytes
from workers.report import Checkpointed, Evaluated, Finished, HostEvent, PackState

NUM_JOBS = 16
TARGETS = ["attention", "mlp", "all-linear", ["q_proj", "v_proj"]]


@pytest.fixture
def ground(tmp_path: Path, test_data: Path) -> Iterator[Ground]:
    ground = Ground(tmp_path, test_data)
    yield ground
    ground.close()


def varied(ground: Ground, number: int) -> Job:
    """A job unlike its neighbours in rank, targets, learning rate, batch size, accumulation, length and steps."""
    return ground.job(
        peft={
            "r": 1 + number % 9,
            "lora_alpha": 4 + number,
            "target_modules": TARGETS[number % 4],
            "lora_dropout": 0.1 * (number % 2),
        },
        training={
            "learning_rate": 1e-3 * (1 + number % 5),
            "max_steps": 2 + number % 4,
            "per_device_train_batch_size": 2 + number % 3,
            "gradient_accumulation_steps": 1 + number % 2,
            "eval_steps": [None, 2, 1][number % 3],
            "max_length": 80 + 8 * (number % 4),
            "seed": number,
        },
    )


def ends(events: Sequence[HostEvent]) -> dict[str, Finished]:
    return {event.job_id: event for event in events if isinstance(event, Finished)}


def alone(ground: Ground, jobs: Sequence[Job], folder: Path) -> dict[str, Finished]:
    """Train each job on a host that has no other, in a store of its own."""
    other = Ground(folder, ground.base.parent.parent)
    host, found = other.host(), {}
    for job in jobs:
        other.resolver.resolve(job.spec)
        host.admit(job)
        found |= ends(drive(host, job))
    host.close()
    return found


def admitted(ground: Ground, jobs: Sequence[Job], **options: Any) -> EngineHost:
    host = ground.host(**options)
    for job in jobs:
        host.admit(job)
    wait(host._line.under_way(), 2.0)  # so that they begin together
    return host


def fail_passes(monkeypatch: pytest.MonkeyPatch, fails: Any) -> list[list[Training]]:
    """Have every pass raise what `fails` returns for its trainings; return the passes that were tried."""
    advance, tried = Pack.advance, []

    def wrapped(self: Pack, trainings: Sequence[Training]) -> Any:
        tried.append(list(trainings))
        if (error := fails(trainings)) is not None:
            for training in trainings:
                training.void_step()
            raise error
        return advance(self, trainings)

    monkeypatch.setattr(Pack, "advance", wrapped)
    return tried


def test_sixteen_unlike_jobs_on_one_host_end_as_each_does_alone(ground: Ground, tmp_path: Path) -> None:
    jobs = [varied(ground, number) for number in range(NUM_JOBS)]
    expected = alone(ground, jobs, tmp_path / "alone")
    found = ends(drive(admitted(ground, jobs, max_tokens=900), *jobs))
    assert [found[job.job_id].status for job in jobs] == ["succeeded"] * NUM_JOBS
    assert [found[job.job_id].adapter_id for job in jobs] == [expected[job.job_id].adapter_id for job in jobs]
    assert [found[job.job_id].metrics for job in jobs] == [expected[job.job_id].metrics for job in jobs]
    assert len({end.adapter_id for end in found.values()}) == NUM_JOBS


def test_a_job_leaves_one_pack_and_goes_on_in_another(ground: Ground, tmp_path: Path) -> None:
    jobs = [varied(ground, number) for number in range(6)]
    mover = ground.job(training={"max_steps": 6, "gradient_accumulation_steps": 2})
    expected = alone(ground, [mover, *jobs], tmp_path / "alone")
    first = admitted(ground, [mover, *jobs[:3]], max_tokens=800)
    found = ends(drive(first, mover, stop_at=7))
    first.evict(mover.job_id, "preempted")
    moved = ends(first.report())[mover.job_id]
    assert (moved.status, 0 < moved.num_steps < 6) == ("preempted", True)
    second = admitted(ground, jobs[3:])
    found |= ends(drive(second, mover, stop_at=1))
    second.admit(mover)
    found |= ends(drive(second, mover, *[job for job in jobs[3:] if job.job_id not in found]))
    found |= ends(drive(first, *[job for job in jobs[:3] if job.job_id not in found]))
    for job in (mover, *jobs):
        assert found[job.job_id].adapter_id == expected[job.job_id].adapter_id


def test_evaluations_of_a_pack_are_done_together_and_each_job_waits_for_its_own_answer(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    evaluate = Pack.evaluate
    monkeypatch.setattr(Pack, "evaluate", lambda self, ones: measured.append(len(ones)) or evaluate(self, ones))
    jobs = [ground.job(training={"seed": seed}) for seed in range(3)]
    host = admitted(ground, jobs)
    told = drain(host)
    assert {event.job_id for event in told if isinstance(event, Evaluated)} == {job.job_id for job in jobs}
    assert measured == [3]
    host.decide(jobs[1].job_id, False)
    assert ends(host.report())[jobs[1].job_id].status == "stopped"
    host.decide(jobs[0].job_id, True)
    assert {event.job_id for event in drain(host) if isinstance(event, Evaluated)} == {jobs[0].job_id}


def test_a_place_that_is_freed_is_filled_at_once(ground: Ground) -> None:
    jobs = [ground.job(training={"seed": seed, "max_steps": 1 + seed, "eval_steps": None}) for seed in range(3)]
    host = admitted(ground, jobs[:2], slots=2)
    assert host.num_free == 0
    first = ends(drive(host, jobs[0]))
    assert first[jobs[0].job_id].status == "succeeded"
    assert host.num_free == 1
    host.admit(jobs[2])
    assert host.num_free == 0
    assert {end.status for end in ends(drive(host, *jobs[1:])).values()} == {"succeeded"}


def test_a_job_that_explodes_ends_and_the_others_bits_stay(ground: Ground, tmp_path: Path) -> None:
    jobs = [varied(ground, number) for number in range(4)]
    exploding = ground.job(training={"learning_rate": 1e30, "max_grad_norm": 0.0, "max_steps": 20, "eval_steps": None})
    expected = alone(ground, jobs, tmp_path / "alone")
    found = ends(drive(admitted(ground, [*jobs, exploding]), *jobs, exploding))
    assert found[exploding.job_id].reason.startswith("non_finite")
    assert [found[job.job_id].adapter_id for job in jobs] == [expected[job.job_id].adapter_id for job in jobs]


def test_a_job_that_a_pass_raises_for_is_expelled_tried_again_alone_and_then_failed(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [varied(ground, number) for number in range(3)]
    poisoned = ground.job(training={"seed": 99, "max_steps": 4, "eval_steps": None})
    expected = alone(ground, jobs, tmp_path / "alone")
    tried = fail_passes(monkeypatch, lambda ones: next((ValueError("bad") for one in ones if one.training.seed == 99), None))
    found = ends(drive(admitted(ground, [poisoned, *jobs]), poisoned, *jobs))
    assert found[poisoned.job_id].status == "failed"
    assert found[poisoned.job_id].reason == "error: ValueError: bad"
    assert [found[job.job_id].adapter_id for job in jobs] == [expected[job.job_id].adapter_id for job in jobs]
    with_it = [[one.training.seed for one in ones] for ones in tried if any(one.training.seed == 99 for one in ones)]
    assert [99] in with_it
    assert with_it[-1] == [99]
    assert len(with_it) == 3  # in the pack, alone at once, and once more from a fresh seat


def test_a_job_that_raised_once_ends_as_if_nothing_had_happened(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [ground.job(training={"seed": seed}) for seed in range(3)]
    expected = alone(ground, jobs, tmp_path / "alone")
    raised: list[int] = []

    def fails(ones: Sequence[Training]) -> Exception | None:
        if len(raised) < 2 and any(one.training.seed == 1 and one.step == 3 for one in ones):
            raised.append(len(ones))
            return ValueError("once in the pack, and once alone")
        return None

    fail_passes(monkeypatch, fails)
    found = ends(drive(admitted(ground, jobs), *jobs))
    assert raised[-1] == 1
    assert [found[job.job_id].adapter_id for job in jobs] == [expected[job.job_id].adapter_id for job in jobs]


def test_a_host_on_which_every_job_raises_is_given_up_instead_of_the_jobs(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_passes(monkeypatch, lambda ones: RuntimeError("CUDA error: device-side assert triggered"))
    host = admitted(ground, [ground.job(training={"seed": seed}) for seed in range(2)])
    with pytest.raises(HostBroken, match="device-side assert"):
        drain(host)
    assert not ends(host.report())
    host.close()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_pass_that_finds_no_memory_is_halved_and_nobody_notices(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    jobs = [varied(ground, number) for number in range(5)]
    expected = alone(ground, jobs, tmp_path / "alone")
    tried = fail_passes(monkeypatch, lambda ones: error if len(ones) > 2 else None)
    found = ends(drive(admitted(ground, jobs), *jobs))
    assert [found[job.job_id].adapter_id for job in jobs] == [expected[job.job_id].adapter_id for job in jobs]
    assert sum(len(ones) > 2 for ones in tried) < len(tried) / 4  # the budget remembers


def test_a_job_that_finds_no_memory_alone_goes_on_with_fewer_rows_says_so_and_leaves_the_others_bits(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [ground.job(training={"seed": seed, "per_device_train_batch_size": 2}) for seed in range(3)]
    large = ground.job(training={"seed": 99, "per_device_train_batch_size": 8})
    expected = alone(ground, jobs, tmp_path / "alone")
    too_much = torch.OutOfMemoryError("no room")
    fail_passes(monkeypatch, lambda ones: too_much if sum(len(one.next_batch()) for one in ones) > 4 else None)
    found = ends(drive(admitted(ground, [*jobs, large]), large, *jobs))
    assert [found[job.job_id].adapter_id for job in jobs] == [expected[job.job_id].adapter_id for job in jobs]
    end = found[large.job_id]
    assert end.status == "succeeded"
    prefix = layout.attempt("acme", large.base.base_id, large.job_id, end.attempt)
    assert decode_record(ground.store.get(f"{prefix}record.json")[0], RECORD_FORMAT, "record")["split_rows"] == 4
    assert end.adapter_id is not None
    manifest = ground.store.get(layout.manifest("acme", large.base.base_id, end.adapter_id))[0]
    assert b'"split_rows":4' in manifest


def test_a_job_that_finds_no_memory_even_row_by_row_fails_with_what_to_lower(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [ground.job(training={"seed": seed, "max_steps": 2}) for seed in range(2)]
    hopeless = ground.job(training={"seed": 99})
    expected = alone(ground, jobs, tmp_path / "alone")
    no_room = torch.OutOfMemoryError("no room")
    fail_passes(monkeypatch, lambda ones: no_room if any(one.training.seed == 99 for one in ones) else None)
    found = ends(drive(admitted(ground, [*jobs, hopeless]), hopeless, *jobs))
    assert found[hopeless.job_id].reason.startswith("out_of_memory: ")
    assert "lower max_length" in found[hopeless.job_id].reason
    assert [found[job.job_id].adapter_id for job in jobs] == [expected[job.job_id].adapter_id for job in jobs]


def limit_for(ground: Ground, job: Job, tokens: int) -> int:
    """Return a limit that holds the base, one adapter like this job's (of a rank that fills its bucket), and so many tokens."""
    host = admitted(ground, [job])
    drive(host, job, stop_at=1)
    assert host._loaded is not None
    shape, (training,) = host._loaded.memory.shape, host._loaded.pack.trainings
    banks = bank_bytes(sum(tensor.numel() for tensor in training.kept_tensors().values()))
    host.evict(job.job_id, "cancelled")
    return shape.num_bytes + banks + shape.head_bytes + tokens * shape.bytes_per_token(checkpointing=False)


def wide(ground: Ground, seed: int) -> Job:
    """A job whose adapter takes more memory than its tokens."""
    training = {"seed": seed, "max_steps": 2, "eval_steps": None, "per_device_train_batch_size": 1}
    return ground.job(training=training, peft={"r": 32, "target_modules": "all-linear"})


def test_a_job_that_cannot_fit_is_refused_by_the_memory_model_before_it_trains(ground: Ground) -> None:
    job = wide(ground, 0)
    host = admitted(ground, [job], memory_limit_bytes=limit_for(ground, job, tokens=20))
    assert ends(drain(host))[job.job_id].reason.startswith("out_of_memory: ")


def test_jobs_that_do_not_fit_together_wait_for_each_other(ground: Ground, tmp_path: Path) -> None:
    jobs = [wide(ground, seed) for seed in range(3)]
    expected = alone(ground, jobs, tmp_path / "alone")
    host = admitted(ground, jobs, memory_limit_bytes=limit_for(ground, jobs[0], tokens=100))
    assert host.num_free == 16 - 3
    drive(host, *jobs, stop_at=1)
    assert len(host._seats) == 1
    found = ends(drive(host, *jobs))
    assert [found[job.job_id].adapter_id for job in jobs] == [expected[job.job_id].adapter_id for job in jobs]


def test_a_job_of_another_base_waits_until_the_host_is_empty(ground: Ground) -> None:
    first = ground.job(training={"max_steps": 3, "eval_steps": None})
    second = ground.job(training={"max_steps": 3, "eval_steps": None}, base_model={"dtype": "bfloat16"})
    host = admitted(ground, [first, second])
    events = drive(host, first, second)
    assert {end.status for end in ends(events).values()} == {"succeeded"}
    assert [event.job_id for event in events if isinstance(event, Finished)] == [first.job_id, second.job_id]


def test_a_claim_that_is_held_elsewhere_does_not_stop_the_pack(ground: Ground) -> None:
    held, free = ground.job(training={"seed": 1}), ground.job(training={"seed": 2, "eval_steps": None})
    owner = Attempt.begin(ground.store, held, Owner.here(), 5.0)
    assert isinstance(owner, Attempt)
    host = ground.host()
    host.admit(held)
    host.admit(free)
    found = ends(drive(host, held, free))
    assert found[free.job_id].status == "succeeded"
    assert found[held.job_id].reason.startswith("held")
    owner.close()


def test_a_job_that_still_waits_for_its_seat_can_be_evicted(ground: Ground) -> None:
    held = ground.job(training={"seed": 1})
    owner = Attempt.begin(ground.store, held, Owner.here(), 5.0)
    assert isinstance(owner, Attempt)
    host = ground.host()
    host.admit(held)
    host.evict(held.job_id, "cancelled")
    owner.end("preempted")
    assert ends(drive(host, held))[held.job_id].status == "cancelled"


def test_a_job_with_bad_input_ends_and_the_others_go_on(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = ground.job(training={"max_steps": 2}), ground.job(training={"seed": 7})
    join = Pack.join

    def refusing(self: Pack, peft: Any, training: Any, *rest: Any, **more: Any) -> Training:
        if training.seed == 7:
            raise BadInput("no.")
        return join(self, peft, training, *rest, **more)

    monkeypatch.setattr(Pack, "join", refusing)
    found = ends(drive(admitted(ground, [good, bad]), good, bad))
    assert found[bad.job_id].reason == "bad_input: no."
    assert found[good.job_id].status == "succeeded"


def test_a_host_tells_of_its_pack(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.host_passes.TELL_SECONDS", 0.0)
    jobs = [ground.job(training={"seed": seed, "eval_steps": None}) for seed in range(2)]
    host = admitted(ground, jobs, name="host-7", max_tokens=10_000)
    states = [event for event in drain(host) if isinstance(event, PackState)]
    assert {state.host for state in states} == {"host-7"}
    assert set(states[-2].job_ids) <= {job.job_id for job in jobs}
    assert any(set(state.job_ids) == {job.job_id for job in jobs} for state in states)
    assert all(0 < state.pass_tokens <= state.budget_tokens for state in states)
    assert [state.num_passes for state in states] == sorted(state.num_passes for state in states)


def test_jobs_checkpoint_each_at_its_own_steps(ground: Ground) -> None:
    every = ground.job(training={"seed": 1, "eval_steps": None, "checkpoint_steps": 1, "max_steps": 3})
    second = ground.job(training={"seed": 2, "eval_steps": None, "checkpoint_steps": 2, "max_steps": 5})
    events = drive(admitted(ground, [every, second]), every, second)
    saved = [(event.job_id, event.step) for event in events if isinstance(event, Checkpointed)]
    assert [step for job_id, step in saved if job_id == every.job_id] == [1, 2]
    assert [step for job_id, step in saved if job_id == second.job_id] == [2, 4]
