"""Handing a night over: its summary, and its page where a channel takes files, by webhook, mail or chat through apprise.

The addresses bear passwords and tokens, so they are read from the environment and appear nowhere: apprise's own log goes nowhere
while it sends, and what is told of a channel is its number and kind. A channel that fails never fails the night.
"""

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pipelines.nightly.figures import has_problems
from pipelines.nightly.page import summary_text
from pipelines.nightly.records import NightReport

MOST_ATTACHED_BYTES = 10_000_000
"""A larger page is left out: mail servers commonly refuse messages above 25 MB, and base64 adds a third."""
PATIENCE_SECONDS = 60.0
"""What one channel may take, connecting included."""

logger = logging.getLogger(__name__)


def notify(
    report: NightReport,
    page: Path | None,
    *,
    on: Literal["always", "problems"],
    urls_env: str,
    env: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Send a night to every channel in the variable `urls_env`; return a sentence for each that did not take it.

    The variable holds addresses as apprise has them (jsons://host/path, mailtos://user:password@host?to=person@host, ...) with
    white space between them. With `on="problems"` nothing is sent of a night that has none. The sentences are logged, too.
    """
    if on == "problems" and not has_problems(report):
        return ()
    urls = (os.environ if env is None else env).get(urls_env, "").split()
    if not urls:
        told: tuple[str, ...] = (f"Nobody was told of this night: the variable {urls_env} holds no address.",)
    else:
        attached = page if page is not None and page.is_file() and page.stat().st_size <= MOST_ATTACHED_BYTES else None
        with _unlogged():
            failures = [_send(report, attached, url, f"{number} of {urls_env}") for number, url in enumerate(urls, 1)]
        told = tuple(failure for failure in failures if failure)
    for sentence in told:
        logger.warning("%s", sentence)
    return told


def _send(report: NightReport, page: Path | None, url: str, which: str) -> str | None:
    """Send to one channel; without the page if it refuses the message with it. Return why it failed, None if it did not."""
    import apprise  # here, since it looks for some hundred services when it is loaded

    kind = re.sub(r"[^a-z0-9+.-]", "", url.partition("://")[0].lower())[:20]
    asset = apprise.AppriseAsset(
        app_id="lorafleet", app_url="", storage_mode="memory", allow_templates=False, service_timeout=PATIENCE_SECONDS
    )
    channel = apprise.Apprise(asset=asset)
    try:
        is_known = channel.add(url)
    except Exception as error:  # what a service's own code raises; its words may quote the address
        return f"Channel {which} ({kind}) cannot be used ({type(error).__name__}); correct its address."
    if not is_known:
        return f"Channel {which} is no address that apprise knows; see its list of services, such as jsons:// and mailtos://."
    failure = _try(channel, report, page)
    if failure is not None and page is not None:
        failure = _try(channel, report, None)
    return None if failure is None else f"Channel {which} ({kind}) did not take the report of the night: {failure}."


def _try(channel: Any, report: NightReport, page: Path | None) -> str | None:
    """Return why the channel did not take it, None if it did."""
    try:
        result = channel.notify(
            body=summary_text(report),
            title=f"lorafleet: night {report.night} of {report.fleet}",
            notify_type="warning" if has_problems(report) else "success",
            body_format="text",
            attach=None if page is None else str(page),
        )
    except Exception as error:  # as above
        return f"it raised {type(error).__name__}"
    if result:
        return None
    if result.status.name == "TIMEOUT":
        return f"no answer within {PATIENCE_SECONDS:.0f} s"
    status = _status_in(result)
    return f"it answered {status}" if status else "it was not reached, or refused"


def _status_in(result: Any) -> str | None:
    """The HTTP status of the last failure, which apprise tells in its log entries only."""
    found = [match[1] for entry in result.logs() if (match := re.search(r"error=(\d{3})\b", entry.message))]
    return found[-1] if found else None


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Keep the words of apprise and of what it sends with out of every log: they quote hosts and paths."""
    theirs, nowhere = [logging.getLogger(name) for name in ("apprise", "urllib3")], logging.NullHandler()
    before = [one.propagate for one in theirs]
    for one in theirs:
        one.propagate = False
        one.addHandler(nowhere)  # without any handler, Python would print warnings itself
    try:
        yield
    finally:
        for one, value in zip(theirs, before, strict=True):
            one.removeHandler(nowhere)
            one.propagate = value
