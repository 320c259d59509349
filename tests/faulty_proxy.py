"""A TCP proxy on loopback that loses answers, tears them, and is slow: what networks do, on demand and repeatably.

It knows just enough of HTTP to tell requests apart: the first bytes that a server sends after a request, other than a
`100 Continue`, begin its answer. Each answer meets at most one fault, drawn from the seed:
- dropped: the request was carried out, the connection closes without a byte of the answer;
- cut: the answer ends after some bytes, in its head or its body;
- delayed: it comes late.

Also a program: `python -m tests.faulty_proxy 127.0.0.1 9000 --drop-answer 0.1` prints its URL and runs until it is ended.
"""

import argparse
import contextlib
import random
import re
import socket
import threading
import time
from collections import Counter
from typing import Self

PIECE_BYTES = 1 << 16
_STARTS_REQUEST = re.compile(rb"(GET|HEAD|PUT|POST|DELETE) /")
_CONDITION = re.compile(rb"\r\nif-(none-)?match:", re.IGNORECASE)
MAX_KEPT_BYTES = 2000
"""A cut answer keeps fewer bytes than this; shorter answers may pass whole."""


class FaultyProxy:
    """Forwards connections to a target while the `with` block runs.

    Args:
        target_host, target_port: Where the connections go.
        seed: Of the faults. Their order is repeatable as far as the order of requests is.
        drop_answer: Share of answers that are dropped, from 0 to 1.
        drop_conditional: The same for answers to requests with If-None-Match or If-Match, beside `drop_answer`.
        delay: Longest delay of an answer in seconds; each waits a random part of it.
        cut_body: Share of answers that are cut.
    """

    def __init__(
        self,
        target_host: str,
        target_port: int,
        *,
        seed: int,
        drop_answer: float = 0.0,
        drop_conditional: float = 0.0,
        delay: float = 0.0,
        cut_body: float = 0.0,
    ) -> None:
        self.drop_answer, self.drop_conditional, self.delay, self.cut_body = drop_answer, drop_conditional, delay, cut_body
        self.num_faults: Counter[str] = Counter()
        self._target = (target_host, target_port)
        self._random = random.Random(seed)
        self._num_to_lose = 0
        self._next_cut: int | None = None
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))

    @property
    def url(self) -> str:
        """Where the proxy listens."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def lose_next(self, number: int) -> None:
        """Drop the next answers, whatever the shares say."""
        self._num_to_lose = number

    def cut_next(self, kept_bytes: int) -> None:
        """Cut the next answer after so many bytes, whatever the shares say."""
        self._next_cut = kept_bytes

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._target)
        except OSError:
            client.close()
            return
        _Connection(self, client, server).run()

    def draw(self, is_conditional: bool = False) -> tuple[str, float, int]:
        """Return the fault of the next answer (pass, drop or cut), its delay in seconds and the bytes a cut leaves."""
        with self._lock:
            number = self._random.random()
            if self.drop_conditional and is_conditional and self._random.random() < self.drop_conditional:
                number = -1.0
            if self._next_cut is not None:
                kept_bytes, self._next_cut = self._next_cut, None
                self.num_faults["cut"] += 1
                return "cut", 0.0, kept_bytes
            if self._num_to_lose > 0:
                self._num_to_lose, number = self._num_to_lose - 1, -1.0
            fault = "drop" if number < self.drop_answer else "cut" if number < self.drop_answer + self.cut_body else "pass"
            self.num_faults[fault] += 1
            return fault, self._random.uniform(0, self.delay), self._random.randrange(1, MAX_KEPT_BYTES)


class _Connection:
    """One client's connection and ours to the target; a thread for each direction."""

    def __init__(self, proxy: FaultyProxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy, self._client, self._server = proxy, client, server
        self._is_answer_due = False
        self._is_conditional = False

    def run(self) -> None:
        """Forward until either side ends; then both do."""
        thread = threading.Thread(target=self._forward, args=(self._requests,), daemon=True)
        thread.start()
        self._forward(self._answers)
        thread.join()
        self._client.close()
        self._server.close()

    def _forward(self, direction) -> None:
        with contextlib.suppress(OSError):
            direction()
        for end in (self._client, self._server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _requests(self) -> None:
        while data := self._client.recv(PIECE_BYTES):
            self._is_answer_due = True
            if _STARTS_REQUEST.match(data):
                self._is_conditional = _CONDITION.search(data.partition(b"\r\n\r\n")[0]) is not None
            self._server.sendall(data)

    def _answers(self) -> None:
        bytes_left: int | None = None  # until the cut of the answer being sent, None if it passes
        while data := self._server.recv(PIECE_BYTES):
            if self._is_answer_due and data.startswith(b"HTTP/1.1 100"):
                interim, end, data = data.partition(b"\r\n\r\n")
                self._client.sendall(interim + end)
            if self._is_answer_due and data:
                self._is_answer_due = False
                fault, delay, kept = self._proxy.draw(self._is_conditional)
                time.sleep(delay)
                if fault == "drop":
                    return
                bytes_left = kept if fault == "cut" else None
            self._client.sendall(data[:bytes_left])
            if bytes_left is not None:
                bytes_left -= len(data)
                if bytes_left <= 0:
                    return


def main() -> None:
    """Run a proxy from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("--seed", type=int, default=0)
    for name in ("--drop-answer", "--delay", "--cut-body"):
        parser.add_argument(name, type=float, default=0.0)
    given = parser.parse_args()
    faults = {"drop_answer": given.drop_answer, "delay": given.delay, "cut_body": given.cut_body}
    with FaultyProxy(given.host, given.port, seed=given.seed, **faults) as proxy:
        print(proxy.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
