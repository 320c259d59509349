"""The page opens without a network, says the numbers, and survives sweeps with little to tell."""

import dataclasses
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from sweeps.ledger import read_header, read_trials
from sweeps.report import render, write_report
from sweeps.spec import SweepSpec
from sweeps.trial import Trial
from tests.sweeps.curves import Bench, resolve, sweep
from workers.spec import JobSpec

DEFAULT = {
    "peft.r": 16,
    "alpha_over_r": 2,
    "peft.target_modules": "all-linear",
    "training.learning_rate": 2e-4,
    "peft.lora_dropout": 0.0,
}


class Page(HTMLParser):
    """Text by element, cells of tables by id, and whatever would be loaded from elsewhere."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.reproduce = self.text = ""
        self.outside: list[str] = []
        self.scripts = 0
        self._open: list[tuple[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.outside += [str(found[name]) for name in ("src", "href") if name in found]
        self.scripts += tag == "script"
        if tag == "table":
            self.tables[found.get("id") or ""] = []
        if tag == "tr":
            list(self.tables.values())[-1].append([])
        if tag not in ("meta", "br"):
            self._open.append((tag, found.get("id") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, name = self._open[-1] if self._open else ("", "")
        if tag in ("td", "th"):
            list(self.tables.values())[-1][-1].append(data)
        if tag == "h2":
            self.headings.append(data)
        if name == "reproduce":
            self.reproduce += data
        if tag != "script":
            self.text += data


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, SweepSpec]:
    bench = Bench(tmp_path_factory.mktemp("searched"))
    spec = sweep(
        num_trials=14, max_concurrent=4, enqueue=[DEFAULT], pruner={"type": "asha", "min_resource": 10, "reduction_factor": 2}
    )
    bench.drive(spec, num_places=4, fails=lambda job: "error: <b>bad</b> & sad" if job.spec.peft.r == 4 else None)
    return bench, spec


def test_report_is_one_file_that_says_what_was_found(searched: tuple[Bench, SweepSpec], tmp_path: Path) -> None:
    bench, _ = searched
    page = Page(write_report(bench.store, "acme", "curves", tmp_path / "pages" / "report.html").read_text())
    assert page.outside == []
    trials = read_trials(bench.store, "acme", "curves")
    complete = sorted((trial for trial in trials if trial.status == "complete"), key=lambda trial: trial.values)
    head, *rows = page.tables["leaderboard"]
    assert head[:3] == ["trial", "status", "eval/loss"]
    assert [row[0] for row in rows[: len(complete)]] == [str(trial.number) for trial in complete]
    assert rows[0][2] == f"{complete[0].values[0]:.6g}"
    assert len(rows) == 14
    best, default = complete[0].values[0], trials[0].values[0]
    assert f"eval/loss: {default:.6g} with the default LoRA, {best:.6g} with the best" in page.text
    assert f"({100 * abs((default - best) / default):.2f} %) better" in page.text
    for heading in ("Learning curves", "History", "Importance", "Slices", "Parallel coordinates", "Distribution"):
        assert heading in page.headings


def test_job_of_the_report_trains_the_best_again(searched: tuple[Bench, SweepSpec], tmp_path: Path) -> None:
    bench, _ = searched
    page = Page(write_report(bench.store, "acme", "curves", tmp_path / "report.html").read_text())
    trials = read_trials(bench.store, "acme", "curves")
    best = min((trial for trial in trials if trial.status == "complete"), key=lambda trial: trial.values)
    assert resolve(JobSpec.model_validate(yaml.safe_load(page.reproduce))).job_id == best.job_id


def test_reasons_are_shown_as_text_not_as_markup(searched: tuple[Bench, SweepSpec], tmp_path: Path) -> None:
    bench, _ = searched
    html = write_report(bench.store, "acme", "curves", tmp_path / "report.html").read_text()
    assert "<b>bad</b>" not in html
    assert "error: <b>bad</b> & sad" in [cell for row in Page(html).tables["reasons"] for cell in row]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_report_of_few_trials(searched: tuple[Bench, SweepSpec], count: int) -> None:
    bench, spec = searched
    trials = [trial for trial in read_trials(bench.store, "acme", "curves") if trial.status == "complete"][:count]
    page = Page(render(read_header(bench.store, "acme", "curves"), spec, _renumbered(trials)))
    assert len(page.tables["leaderboard"]) == 1 + count
    assert ("nothing to compare" in page.text) == (count == 0)


def test_report_of_several_objectives_names_the_front(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    objectives = [{"metric": "eval/loss"}, {"metric": "eval/accuracy", "direction": "maximize"}]
    result = bench.drive(sweep(num_trials=4, objective=objectives, enqueue=[DEFAULT]))
    page = Page(write_report(bench.store, "acme", "curves", tmp_path / "report.html").read_text())
    assert result.best is not None
    assert f"No other trial is better in every objective: {result.best.number}." in page.text
    assert "Pareto front" in page.headings


def _renumbered(trials: list[Trial]) -> list[Trial]:
    return [
        dataclasses.replace(
            trial,
            number=number,
            events=tuple(dataclasses.replace(event, seq=100 * number + index) for index, event in enumerate(trial.events)),
        )
        for number, trial in enumerate(trials)
    ]
