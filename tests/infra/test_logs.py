"""What reaches people, what reaches the file, and that secrets reach neither."""

import subprocess
import sys
from pathlib import Path

import pytest

from infra.logs import redact


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("at http://me:hunter2@host:5000/x", "at http://me:***@host:5000/x"),
        ("at postgresql+psycopg2://:hunter2@/db", "at postgresql+psycopg2://:***@/db"),
        ("key AKIAIOSFODNN7EXAMPLE used", "key *** used"),
        ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG", "aws_secret_access_key = ***"),
        ('{"password": "hunter2hunter2", "r": 8}', '{"password": "***", "r": 8}'),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer ***"),
        ("s3://b/k?X-Amz-Signature=0123456789ab&x=1", "s3://b/k?X-Amz-Signature=***&x=1"),
        ("hf_abcdefghijklmnopqrstuv given", "*** given"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text: str, redacted: str) -> None:
    assert redact(text) == redacted


@pytest.mark.parametrize(
    "text",
    [
        "trained 512 tokens, tokens/s: 1234, num_tokens=99",
        "stored tenants/acme/adapters/abcdefgh at s3://bucket/prefix",
        "the key 'peft.rank' is missing; add it.",
        "step 3: eval/loss 0.52 at 12:30:05",
    ],
)
def test_ordinary_lines_stay_as_they_are(text: str) -> None:
    assert redact(text) == text


def test_values_of_secret_variables_are_hidden_but_short_words_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "correct horse battery")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert redact("it said correct horse battery, false") == "it said ***, false"


PROGRAM = """
import logging, sys, warnings
from pathlib import Path
from infra.logs import set_up_logs

set_up_logs(Path(sys.argv[1]))
set_up_logs(Path(sys.argv[1]))
logging.getLogger("workers.host").info("A sentence for people.")
logging.getLogger("workers.host").debug("A detail.")
logging.getLogger("botocore").warning("Vendor noise.")
warnings.warn("Old ways.")
try:
    raise ValueError("cannot open http://me:hunter2@host")
except ValueError:
    logging.getLogger("infra.s3").debug("It failed with %s", "password=hunter2hunter2", exc_info=True)
"""


def test_people_see_our_sentences_and_the_file_everything_and_nobody_secrets(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "A sentence for people.\n")
    written = (tmp_path / "logs" / "lorafleet.log").read_text()
    for expected in ("A sentence for people.", "A detail.", "Vendor noise.", "Old ways.", "Traceback", "http://me:***@host"):
        assert written.count(expected) == 1, expected
    assert "hunter2" not in written


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_log_file_on_a_full_disk_is_told_once_and_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "lorafleet.log").symlink_to("/dev/full")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True)
    told = f"note: the log file {tmp_path}/logs/lorafleet.log cannot be written (No space left on device); going on without it."
    assert (done.returncode, sorted(done.stderr.splitlines())) == (0, ["A sentence for people.", told])


def test_setting_up_leaves_handlers_of_others_in_place(tmp_path: Path) -> None:
    program = """
import logging, sys
from pathlib import Path
from infra.logs import set_up_logs
other = logging.NullHandler()
logging.getLogger().addHandler(other)
set_up_logs(Path(sys.argv[1]))
assert other in logging.getLogger().handlers
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
