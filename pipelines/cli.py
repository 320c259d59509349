"""The command line: words to functions, errors to sentences and exit codes. Nothing heavy is imported before a command needs it.

Exit codes: 0 ok, 1 work failed, 2 bad input, 3 gate rejected, 4 a service is not reachable; 130 after Ctrl-C.
"""

import logging
import sys
from collections.abc import Sequence

import click
import typer
from rich.console import Console

from infra.errors import LorafleetError
from pipelines.cli_common import app, load

log = logging.getLogger("lorafleet")
for module in ("cli_making", "cli_registry", "cli_operations"):  # --help lists the commands in this order
    load(f"pipelines.{module}")


def main() -> None:
    """Run the command line; whatever goes wrong is one sentence on stderr and the documented exit code."""
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: Sequence[str]) -> int:
    command = typer.main.get_command(app)
    try:
        result = command.main(args=list(arguments), prog_name="lorafleet", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show(sys.stdout)
        return 0
    except click.ClickException as error:
        error.show()
        return 2
    except (KeyboardInterrupt, click.exceptions.Abort):
        _say("interrupted: what was running is checkpointed; the same command continues.")
        return 130
    except LorafleetError as error:
        log.debug("failed", exc_info=True)
        _say(str(error))
        return error.exit_code
    except BrokenPipeError:
        return 0
    except Exception as error:  # the last line of defence: a person gets a sentence, the log file the traceback
        log.critical("unexpected error", exc_info=True)
        _say(f"unexpected {type(error).__name__}: {error}. This is a defect of lorafleet; the log file in its home tells more.")
        return 1


def _say(sentence: str) -> None:
    Console(stderr=True).print(f"error: {sentence}", style="red", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
