"""A mailbox: messages from one thread to another, first in, first out, which can be closed.

Both launchers build their channels from it. Messages are held pickled: what cannot travel fails in the sender's
hands, whatever the launcher, and no object is ever shared between the two sides.
"""

import pickle
import threading
import time
from collections import deque
from typing import Any


def pack(message: Any) -> bytes:
    """Pickle a message; raises what pickle raises (TypeError, PicklingError) where the message cannot travel."""
    return pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)


def unpack(data: bytes) -> Any:
    """Undo `pack`. Only for bytes of our own processes: whoever can write to a channel can already run code there."""
    return pickle.loads(data)  # noqa: S301


class Mailbox:
    """Packed messages in order. Thread-safe; one that waits uses no processor."""

    def __init__(self) -> None:
        self._messages: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether nothing more will be taken in."""
        return self._closed

    def put(self, packed: bytes) -> None:
        """Append a message; it is dropped if the mailbox is closed."""
        with self._changed:
            if not self._closed:
                self._messages.append(packed)
                self._changed.notify_all()

    def close(self, *, discard: bool) -> None:
        """Take nothing more in and wake all who wait. `discard` throws away what waits; otherwise it can still be taken."""
        with self._changed:
            self._closed = True
            if discard:
                self._messages.clear()
            self._changed.notify_all()

    def take(self, timeout_seconds: float | None) -> list[bytes]:
        """Remove and return all messages, or wait for the first (`None`: for ever); empty after the time-out or when closed."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        with self._changed:
            while not self._messages and not self._closed:
                left = None if deadline is None else deadline - time.monotonic()
                if (left is not None and left <= 0) or not self._changed.wait(left):
                    break
            taken = list(self._messages)
            self._messages.clear()
            return taken


class MailboxChannel:
    """One end of a channel in this process: takes from `inbox`, puts into `outbox`."""

    def __init__(self, inbox: Mailbox, outbox: Mailbox) -> None:
        self._inbox = inbox
        self._outbox = outbox

    @property
    def closed(self) -> bool:
        return self._outbox.closed

    def send(self, message: Any) -> None:
        self._outbox.put(pack(message))

    def receive(self, timeout_seconds: float) -> list[Any]:
        return [unpack(packed) for packed in self._inbox.take(timeout_seconds)]
