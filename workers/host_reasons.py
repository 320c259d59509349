"""Why a job failed on a host, in the words that `report.Finished` and `fleet.after_failure` know."""

from infra.errors import BadInput, ClaimHeld, ClaimLost, LorafleetError, ServiceUnavailable
from workers.memory import is_out_of_memory

OUT_OF_MEMORY = (
    "out_of_memory: the job does not fit even alone and row by row; lower max_length, peft.r or target_modules, "
    "or set gradient_checkpointing."
)


def reason_not_begun(error: BaseException) -> str:
    """Return why a job could not be claimed: somebody else has it, the store does not answer, its state cannot be read.

    None of these is a failure of the job's own, which would come again.
    """
    return f"{_word_of(error)}: {error}"


def reason_of(error: BaseException) -> str:
    """Return why a job that was begun has failed."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    if isinstance(error, BadInput):
        return f"bad_input: {error}"
    if isinstance(error, LorafleetError):
        return f"{_word_of(error)}: {error}"
    return f"error: {type(error).__name__}: {error}"


def _word_of(error: BaseException) -> str:
    match error:
        case ClaimHeld():
            return "held"
        case ClaimLost():
            return "claim_lost"
        case ServiceUnavailable():
            return "store"
        case _:
            return "error"
