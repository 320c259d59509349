"""What people at other terminals see of a sweep's packs."""

import io
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines.live import draw, pack_line
from sweeps import control
from sweeps.packs import PackView, packs_of, read_packs, write_packs
from sweeps.view import SweepView, TrialView
from tests.sweeps.curves import Bench, CurveFleet, sweep
from workers.report import HostEvent, PackState

PACK = PackView("host-1", (3, 5), 4096, 3072, 1234.5, 17, 1000.0)


def test_packs_are_those_with_trials_of_the_sweep_by_host() -> None:
    states = [
        PackState("host-10", ("a", "b", "foreign"), 100, 90, 1.0, 2, 3.0),
        PackState("host-2", ("c",), 100, 90, 1.0, 2, 3.0),
        PackState("host-3", ("foreign",), 100, 90, 1.0, 2, 3.0),
        PackState("host-4", (), 100, 0, 0.0, 0, 3.0),
    ]
    packs = packs_of(states, {"a": 7, "b": 4, "c": 5})
    assert [(pack.host, pack.trials) for pack in packs] == [("host-2", (5,)), ("host-10", (4, 7))]


class PackedFleet(CurveFleet):
    """Tells of a pack of all that live, after every look."""

    def events(self, timeout_seconds: float) -> list[HostEvent]:
        told: list[HostEvent] = list(super().events(timeout_seconds))
        job_ids = tuple(job.job_id for job in self._jobs)
        return [*told, PackState("host-1", job_ids, 4096, 3072, 1234.5, 17, time.time())]


def test_a_running_sweep_shows_its_packs_and_one_that_has_ended_none(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tests.sweeps.curves.CurveFleet", PackedFleet)
    bench, seen, live = Bench(tmp_path), [], []

    def look(view: SweepView) -> None:
        live.append(view.packs)
        seen.append(control.status(bench.store, "acme", "curves").packs)

    bench.drive(sweep(num_trials=4, max_concurrent=2), num_places=2, on_change=look, request_seconds=0.0)
    assert {pack.trials for packs in seen for pack in packs} >= {(0, 1), (2, 3)}
    assert all(set(before) <= _flat(live) for before in seen)
    assert control.status(bench.store, "acme", "curves").packs == ()


def _flat(views: list[tuple[PackView, ...]]) -> set[PackView]:
    return {pack for packs in views for pack in packs}


def test_a_store_without_packs_or_with_others_shows_none(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert read_packs(bench.store, "acme", "curves") == ()
    write_packs(bench.store, "acme", "curves", [PACK])
    assert read_packs(bench.store, "acme", "curves") == (PACK,)
    bench.store.put("tenants/acme/sweeps/curves/packs.json", b"{}")
    assert read_packs(bench.store, "acme", "curves") == ()


def test_an_old_pack_says_how_old_it_is() -> None:
    line = pack_line(PACK)
    assert line.startswith("host-1  2 in the pack (3, 5)   3,072 of 4,096 tokens a pass   1,234 tokens/s   17 passes  (told ")
    assert "told" not in pack_line(PackView(**{**vars(PACK), "told": time.time()}))


def test_the_picture_of_a_sweep_has_a_line_for_each_pack() -> None:
    view = SweepView("acme", "curves", "running", 4, {}, (), None, (), 0.0, 0.0, None, packs=(PACK, PACK))
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(draw(view, height=40))
    assert console.export_text().count("in the pack") == 2


def test_a_narrow_terminal_cuts_the_parameters_and_nothing_else() -> None:
    params = {"peft.target_modules": "all-linear", "training.learning_rate": 0.000257, "peft.r": 16}
    trial = TrialView(11, "complete", "", params, 100, 100, 1.25, 0.1936, 0.0, "a" * 32, None)
    view = SweepView("acme", "curves", "complete", 12, {"complete": 1}, (trial,), trial, (), 0.0, 13.0, 0.0)
    console = Console(width=72, file=io.StringIO(), record=True)
    console.print(draw(view, height=40))
    [line] = [line for line in console.export_text().splitlines() if "*11" in line]
    assert line.split()[:5] == ["*11", "complete", "100/100", "1.2500", "0.1936"]
    assert line.endswith("…")
