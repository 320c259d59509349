"""The live view of a sweep: a redrawn table on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sweeps.packs import PackView
from sweeps.view import SweepView, TrialView

REFRESH_SECONDS = 0.25
LINE_SECONDS = 10.0
"""Time between two progress lines where there is no terminal; ends of trials are told at once."""
OLD_SECONDS = 30.0
"""A pack that was told longer ago says so: hosts tell theirs every few seconds."""
STYLES = {"running": "cyan", "complete": "green", "pruned": "yellow", "failed": "red", "infeasible": "magenta"}


def duration(seconds: float | None) -> str:
    """Return a time as people say it: 42s, 3m10s, 2h05m; a dash for None."""
    if seconds is None:
        return "-"
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def counts_text(view: SweepView) -> str:
    """Return the totals in one line: 7 of 24 trials: 4 complete, 2 pruned, 1 running."""
    ended = sum(count for status, count in view.counts.items() if status != "running")
    parts = ", ".join(f"{count} {status}" for status, count in view.counts.items() if count)
    return f"{ended} of {view.num_trials} trials ended" + (f" ({parts})" if parts else "")


class LiveView:
    """Redraws a sweep on a terminal."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._drawn = 0.0

    def __enter__(self) -> "LiveView":
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def show(self, view: SweepView) -> None:
        now = time.monotonic()
        if now - self._drawn >= REFRESH_SECONDS:
            self._drawn = now
            self._live.update(draw(view, self._live.console.height), refresh=True)


class LineView:
    """Writes a line when a trial ends, and one now and then in between."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told: set[int] = set()
        self._last = time.monotonic()
        self._is_first = True

    def __enter__(self) -> "LineView":
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to put away."""

    def show(self, view: SweepView) -> None:
        ended = [trial for trial in view.trials if trial.status != "running"]
        if self._is_first:
            self._told = {trial.number for trial in ended}
            self._is_first = False
        for trial in ended:
            if trial.number not in self._told:
                self._told.add(trial.number)
                self._console.print(trial_line(trial), highlight=False, soft_wrap=True)
        if time.monotonic() - self._last >= LINE_SECONDS:
            self._last = time.monotonic()
            best = f", best {view.best.value:.4f}" if view.best is not None and view.best.value is not None else ""
            line = f"{counts_text(view)}{best}, {view.tokens_per_second:,.0f} tokens/s, {duration(view.seconds_left)} left"
            self._console.print(line, highlight=False, soft_wrap=True)


@contextmanager
def watching(console: Console) -> Iterator[LiveView | LineView]:
    """Open the view that suits the console."""
    with LiveView(console) if console.is_terminal else LineView(console) as view:
        yield view


def trial_line(trial: TrialView) -> str:
    """Return the end of a trial as one line."""
    value = "" if trial.value is None else f" {trial.value:.4f}"
    copy = "" if trial.duplicate_of is None else f" (same job as trial {trial.duplicate_of})"
    reason = f": {trial.reason}" if trial.reason else ""
    return f"trial {trial.number} {trial.status}{value} after {trial.step} steps{copy}{reason}  {params_text(trial)}"


def params_text(trial: TrialView) -> str:
    """Return a trial's parameters in one line, the common prefixes left out."""
    return ", ".join(f"{path.rsplit('.', 1)[-1]}={_shown(value)}" for path, value in trial.params.items())


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def draw(view: SweepView, height: int) -> Group:
    """Return the picture of a sweep: totals, the latest trials that fit, rungs, notes."""
    title = Text(f"{view.tenant}/{view.name}  {view.status}", style="bold")
    line = f"{counts_text(view)}   {view.tokens_per_second:,.0f} tokens/s   {duration(view.seconds)} spent, "
    totals = Text(line + f"{duration(view.seconds_left)} left")
    rungs = "   ".join(f"step {rung.step}: {rung.num_reached} reached, {rung.num_pruned} pruned" for rung in view.rungs)
    notes = [Text(note, style="yellow") for note in view.notes]
    packs = [Text(pack_line(pack)) for pack in view.packs]
    room = max(4, height - 8 - len(notes) - len(packs))
    return Group(title, totals, trial_table(view, room), Text(f"rungs  {rungs}" if rungs else ""), *packs, *notes)


def pack_line(pack: PackView) -> str:
    """Return a host's pack as one line, with its age if it is old: its host, or its driver, may be gone."""
    age = time.time() - pack.told
    old = f"  (told {duration(age)} ago)" if age > OLD_SECONDS else ""
    trials = ", ".join(map(str, pack.trials))
    use = f"{pack.pass_tokens:,} of {pack.budget_tokens:,} tokens a pass   {pack.tokens_per_second:,.0f} tokens/s"
    return f"{pack.host}  {len(pack.trials)} in the pack ({trials})   {use}   {pack.num_passes:,} passes{old}"


def trial_table(view: SweepView, room: int) -> Table:
    """Return the live trials and the latest ended ones, as many as fit; the best is marked."""
    table = Table(box=None, pad_edge=False)
    for name in ("trial", "status", "step", "loss", "value"):
        table.add_column(name, justify="left" if name == "status" else "right", no_wrap=True)
    table.add_column("parameters")  # the one that gives way where the terminal is narrow
    live = [trial for trial in view.trials if trial.status == "running"]
    ended = [trial for trial in view.trials if trial.status != "running"]
    shown = ended[-max(1, room - len(live)) :] + live
    if view.best is not None and all(trial.number != view.best.number for trial in shown):
        shown.insert(0, view.best)
    for trial in shown:
        is_best = view.best is not None and trial.number == view.best.number
        table.add_row(
            f"{'*' if is_best else ''}{trial.number}",
            Text(trial.status, style=STYLES.get(trial.status, "")),
            f"{trial.step}/{trial.num_steps}" if trial.num_steps else str(trial.step),
            "" if trial.loss is None else f"{trial.loss:.4f}",
            "" if trial.value is None else f"{trial.value:.4f}",
            Text(params_text(trial) + (f"  {trial.reason}" if trial.reason else ""), no_wrap=True, overflow="ellipsis"),
            style="bold" if is_best else "",
        )
    return table
