"""Logging: plain sentences on stderr for people, everything in a file for whoever looks for a cause, secrets in neither."""

import logging
import logging.handlers
import os
import re
import sys
from pathlib import Path

OUR_PACKAGES = ("infra", "workers", "sweeps", "pipelines", "lorafleet")

FILE_BYTES = 10_000_000
"""The log file is set aside at this size; five older ones are kept."""

HIDDEN = "***"

_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|KEY", re.IGNORECASE)
_SHORTEST_SECRET = 8
"""Values of variables shorter than this are not hidden: TOKENIZERS_PARALLELISM=false would hide every "false"."""

_PATTERNS = (
    (re.compile(r"(?<=://)([^/\s:@]*):([^/\s@]+)@"), rf"\1:{HIDDEN}@"),
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), HIDDEN),
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}\b"), HIDDEN),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), rf"\1 {HIDDEN}"),
    (
        re.compile(
            r"(?i)([\w-]*(?:secret|token|password|passwd|access_?key|api_?key|signature|credential)[\w-]*[\"']?\s*[=:]\s*[\"']?)[^\s\"'&,;}]{6,}"
        ),
        rf"\1{HIDDEN}",
    ),
)
"""Passwords in URLs, AWS key ids, Hugging Face tokens, authorization headers, and `name=value` where the name tells."""


def redact(text: str) -> str:
    """Return `text` without what looks like a secret, or is the value of an environment variable named like one."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name):
            text = text.replace(value, HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


class RedactingFormatter(logging.Formatter):
    """Redacts the finished line: message, arguments and traceback alike, which a filter on records would not see."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class LogFile(logging.handlers.RotatingFileHandler):
    """A log file whose full disk is told once, in a sentence, and ends nothing."""

    _is_told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  the name is logging's
        error = sys.exception()
        if not isinstance(error, OSError):
            return super().handleError(record)
        if not self._is_told:
            self._is_told = True
            sys.stderr.write(
                f"note: the log file {self.baseFilename} cannot be written ({error.strerror}); going on without it.\n"
            )
        return None


def set_up_logs(home: Path, *, verbose: bool = False, file_name: str = "lorafleet.log") -> Path:
    """Send our messages to stderr and everything to `<home>/logs/<file_name>`; return that file's path.

    Stderr gets our own from INFO up (DEBUG if `verbose`); the file gets ours from DEBUG up, others' from INFO up, and
    Python's warnings. Called again, it replaces what it set before. Processes that live long have a file each.
    """
    path = home / "logs" / file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    to_file = LogFile(path, maxBytes=FILE_BYTES, backupCount=5, encoding="utf-8", delay=True)
    to_file.setFormatter(RedactingFormatter("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"))
    to_people = logging.StreamHandler()
    to_people.setFormatter(RedactingFormatter("%(message)s"))
    to_people.setLevel(logging.DEBUG if verbose else logging.INFO)
    to_people.addFilter(_is_ours)
    _replace_handlers(to_file, to_people)
    logging.captureWarnings(True)
    return path


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] in OUR_PACKAGES


def _replace_handlers(*handlers: logging.Handler) -> None:
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler.formatter, RedactingFormatter)]:
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    for package in OUR_PACKAGES:
        logging.getLogger(package).setLevel(logging.DEBUG)
