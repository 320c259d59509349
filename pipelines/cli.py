"""The command line: words to functions, errors to sentences and exit codes. Nothing heavy is imported before a command needs it.

Exit codes: 0 ok, 1 work failed, 2 bad input, 3 gate rejected, 4 a service is not reachable; 130 after Ctrl-C or `sweep stop`.
"""

import atexit
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer
from rich.console import Console

from infra.errors import LorafleetError
from pipelines.cli_common import INTERRUPTED, app, load, print_text

log = logging.getLogger("lorafleet")

for module in (
    "cli_making",
    "cli_nightly",
    "cli_registry",
    "cli_serving",
    "cli_audit",
    "cli_operations",
):  # --help lists the commands in this order
    load(f"pipelines.{module}")


def main() -> None:
    """Run the command line; whatever goes wrong is one sentence on stderr and the documented exit code. Does not return."""
    _leave(_run(sys.argv[1:]))


def _leave(code: int) -> NoReturn:
    """End the process, once everything that is registered for its end is done and what was printed is out.

    Python would then take apart torch, MLflow and Ray piece by piece: 1.4 s in which nothing happens that anybody needs.
    """
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:  # nobody reads any more, as after "| head"
        pass
    except OSError:
        code = code or 1
    os._exit(code)


def _run(arguments: Sequence[str]) -> int:
    if not logging.getLogger().handlers:
        # Until a command has set up the logs, Python itself would print warnings and tracebacks to stderr.
        logging.getLogger().addHandler(logging.NullHandler())
    command = typer.main.get_command(app)
    try:
        result = command.main(args=list(arguments), prog_name="lorafleet", standalone_mode=False)
        code = result if isinstance(result, int) else 0
        if code == INTERRUPTED:
            _say("interrupted: what was running is checkpointed; the same command continues.")
        return code
    except typer.TyperException as error:
        return _misused(error)
    except typer.Abort:
        return INTERRUPTED
    except LorafleetError as error:
        log.debug("failed", exc_info=True)
        _say(str(error))
        return error.exit_code
    except BrokenPipeError:
        return 0
    except Exception as error:  # the last line of defence: a person gets a sentence, the log file the traceback
        log.debug("unexpected error", exc_info=True)
        _say(f"unexpected {type(error).__name__}: {error}. This is a defect of lorafleet; the log file in its home tells more.")
        return 1


def _misused(error: typer.TyperException) -> int:
    """Say what is wrong with the words of a command; a group of commands without one gets its help."""
    context = getattr(error, "ctx", None)
    if context is None:
        _say(error.format_message())
        return 2
    if error.message == context.get_help():
        print_text(error.message)
        return 0
    _say(f"{error.format_message().rstrip('.')}; see '{context.command_path} --help'.")
    return 2


def _say(sentence: str) -> None:
    Console(stderr=True).print(f"error: {sentence}", style="red", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
