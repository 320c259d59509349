"""A night reaches people by webhook and mail, and no channel that is away, refuses or is nonsense can harm it."""

import base64
import dataclasses
import email
import email.policy
import http.server
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller

from pipelines.nightly.notify import MOST_ATTACHED_BYTES, notify
from pipelines.nightly.page import write_page
from tests.contracts.storage_servers import free_port
from tests.pipelines.nightly.nights import a_night, promoted

SECRET = "s3cr3t-t0ken"


class Receiver(http.server.BaseHTTPRequestHandler):
    """A webhook that keeps what it is sent, and refuses what is larger than it likes."""

    received: list[dict[str, Any]]
    answer: int
    most_bytes: int

    def do_POST(self) -> None:  # noqa: N802  the name is http.server's
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = self.answer if len(body) <= self.most_bytes else 413
        self.received.append({"path": self.path, "answer": answer, **json.loads(body)})
        self.send_response(answer)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@dataclasses.dataclass
class Webhook:
    """A webhook that runs on loopback."""

    url: str
    handler: type[Receiver]


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    handler = type("Handler", (Receiver,), {"received": [], "answer": 200, "most_bytes": 10**9})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield Webhook(f"json://127.0.0.1:{server.server_port}/hooks/{SECRET}", handler)
        server.shutdown()
        thread.join()


class Mailbox:
    """What a mail server took."""

    def __init__(self) -> None:
        self.taken: list[tuple[list[str], email.message.EmailMessage]] = []

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802  the name is aiosmtpd's
        message = email.message_from_bytes(envelope.content, policy=email.policy.default)
        assert isinstance(message, email.message.EmailMessage)
        self.taken.append((envelope.rcpt_tos, message))
        return "250 taken"


@pytest.fixture
def mail() -> Iterator[tuple[str, Mailbox]]:
    """The address of a mail server on loopback, and what it took."""
    mailbox, port = Mailbox(), free_port()
    server = Controller(mailbox, hostname="127.0.0.1", port=port)
    server.start()
    yield f"mailto://127.0.0.1:{port}?mode=insecure&from=night@example.com&to=ops@example.com", mailbox
    server.stop()


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return write_page(a_night(), tmp_path / "night.html")


def send(*urls: str, page: Path | None = None, **values: Any) -> tuple[str, ...]:
    on = values.pop("on", "always")
    return notify(
        dataclasses.replace(a_night(), **values), page, on=on, urls_env="NIGHT_URLS", env={"NIGHT_URLS": "\n".join(urls)}
    )


def test_a_webhook_gets_the_summary_and_the_page(webhook: Webhook, page: Path) -> None:
    assert send(webhook.url, page=page) == ()
    (message,) = webhook.handler.received
    assert message["title"] == "lorafleet: night 2026-11-24 of prod"
    assert "1 failed (1 non_finite)" in message["message"]
    assert message["type"] == "warning"
    (attached,) = message["attachments"]
    assert attached["filename"] == "night.html"
    assert base64.b64decode(attached["base64"]) == page.read_bytes()


def test_a_mail_gets_the_summary_and_the_page(mail: tuple[str, Mailbox], page: Path) -> None:
    url, mailbox = mail
    assert send(url, page=page) == ()
    ((to, message),) = mailbox.taken
    assert to == ["ops@example.com"]
    assert message["Subject"] == "lorafleet: night 2026-11-24 of prod"
    body = message.get_body(("plain",))
    assert body is not None
    assert "held umbrella.support: 12 rows, 97 % fewer than the 400 of last time." in body.get_content()
    (attached,) = message.iter_attachments()
    assert attached.get_filename() == "night.html"
    assert attached.get_payload(decode=True) == page.read_bytes()


def test_a_channel_that_is_away_keeps_no_other_from_hearing(webhook: Webhook, mail: tuple[str, Mailbox], page: Path) -> None:
    nobody = f"json://user:{SECRET}@127.0.0.1:{free_port()}/{SECRET}"
    told = send(nobody, webhook.url, mail[0], page=page)
    assert told == ("Channel 1 of NIGHT_URLS (json) did not take the report of the night: it was not reached, or refused.",)
    assert len(webhook.handler.received) == len(mail[1].taken) == 1


def test_a_channel_that_refuses_is_told_with_its_answer(webhook: Webhook) -> None:
    webhook.handler.answer = 503
    assert send(webhook.url) == ("Channel 1 of NIGHT_URLS (json) did not take the report of the night: it answered 503.",)


def test_a_channel_that_refuses_the_page_gets_the_summary_alone(webhook: Webhook, page: Path) -> None:
    webhook.handler.most_bytes = 8_000
    assert send(webhook.url, page=page) == ()
    assert [message["answer"] for message in webhook.handler.received] == [413, 200]
    assert webhook.handler.received[1]["attachments"] == []


def test_a_page_too_large_for_mail_is_left_out(webhook: Webhook, tmp_path: Path) -> None:
    large = tmp_path / "night.html"
    large.write_bytes(b" " * (MOST_ATTACHED_BYTES + 1))
    assert send(webhook.url, page=large) == ()
    assert webhook.handler.received[0]["attachments"] == []


@pytest.mark.parametrize("nonsense", [f"nonsense://{SECRET}", f"slack://{SECRET}", f"https://{SECRET}@[::bad", SECRET, "json://"])
def test_nonsense_is_told_by_its_number_alone(webhook: Webhook, nonsense: str) -> None:
    (told,) = send(webhook.url, nonsense)
    assert told.startswith("Channel 2 of NIGHT_URLS ")
    assert SECRET not in told
    assert len(webhook.handler.received) == 1


def test_addresses_are_never_logged(
    webhook: Webhook, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    webhook.handler.answer = 500
    told = send(
        webhook.url, f"json://user:{SECRET}@127.0.0.1:{free_port()}/x", f"mailto://{SECRET}:{SECRET}@127.0.0.1:{free_port()}"
    )
    assert [record.getMessage() for record in caplog.records] == list(told)
    assert len(told) == 3
    printed = capfd.readouterr()
    assert SECRET not in "".join(told) + printed.out + printed.err


def test_without_an_address_nobody_is_told_and_that_is_said() -> None:
    assert notify(a_night(), None, on="always", urls_env="NIGHT_URLS", env={}) == (
        "Nobody was told of this night: the variable NIGHT_URLS holds no address.",
    )


def test_only_problems_are_told_where_that_was_asked(webhook: Webhook) -> None:
    calm: dict[str, Any] = {"remarks": (), "rows": (promoted("acme", challenger=1.0, champion=1.1),)}
    assert send(webhook.url, on="problems", **calm) == ()
    assert webhook.handler.received == []
    assert send(webhook.url, **calm) == ()
    assert webhook.handler.received[0]["type"] == "success"
    assert send(webhook.url, on="problems") == ()
    assert len(webhook.handler.received) == 2


def test_the_variable_with_the_addresses_is_no_unknown_setting(tmp_path: Path) -> None:
    from infra.settings import load_settings

    assert SECRET not in str(load_settings(tmp_path, {"LORAFLEET_NOTIFY_URLS": SECRET}).public())
