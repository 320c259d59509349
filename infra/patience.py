"""Patience with what fails for a while: when to try again, and when to give up."""

import random
import time

FIRST_PAUSE_SECONDS = 0.1
MAX_PAUSE_SECONDS = 5.0


class Patience:
    """Pauses between tries: doubling, with jitter, and bounded in total."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._pause = FIRST_PAUSE_SECONDS

    def wait(self) -> bool:
        """Sleep before the next try; return False, at once, if there should be none."""
        pause = self._pause * random.uniform(0.5, 1.0)
        self._pause = min(2 * self._pause, MAX_PAUSE_SECONDS)
        if time.monotonic() + pause > self._deadline:
            return False
        time.sleep(pause)
        return True
