"""The one tree of errors that people may meet, each with the exit code of the command line.

Every error carries one sentence that says what was expected, what came, and the way out; it is its only
argument, so that all of them can be pickled and cross Ray. Each is a standard library type as well.
"""


class LorafleetError(Exception):
    """Root of the tree. `exit_code` is what the command line ends with when this error reaches it."""

    exit_code = 1


class WorkFailed(LorafleetError, RuntimeError):
    """Work was done as asked and did not succeed (exit code 1)."""


class BadInput(LorafleetError, ValueError):
    """What a person wrote or named cannot be used (exit code 2)."""

    exit_code = 2


class WrongBase(BadInput):
    """An adapter was about to meet a base model it was not trained on."""


class GateRejected(LorafleetError, RuntimeError):
    """A gate refused a candidate (exit code 3)."""

    exit_code = 3


class ServiceUnavailable(LorafleetError, ConnectionError):
    """A store, MLflow or Ray did not answer or cannot be used as it is (exit code 4)."""

    exit_code = 4


class ObjectNotFound(LorafleetError, KeyError):
    """No object is stored under a key."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ConditionFailed(LorafleetError, RuntimeError):
    """A conditional put lost: the object exists already, or is no longer the one that was read."""


class ClaimHeld(LorafleetError, RuntimeError):
    """Somebody else, alive, owns what was to be claimed."""


class ClaimLost(LorafleetError, RuntimeError):
    """Another owner took the next epoch; nothing written from here on can be reached."""
