"""Stores that cannot be used say so in one sentence with the way out, before anything relies on them."""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.errors import LorafleetError
from infra.local_storage import HIDDEN, LocalStorage
from infra.s3 import S3Storage
from infra.stores import open_store, probe
from tests.contracts.storage_servers import SECRET_KEY, S3Server, free_port

AS_NOBODY = """
import os, sys
from infra.stores import open_store, probe
if os.getuid() == 0:
    os.setuid(65534)
try:
    probe(open_store(sys.argv[1]))
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""
WITH_SMALL_FILES = """
import resource, sys
from infra.local_storage import LocalStorage
from pathlib import Path
store = LocalStorage(Path(sys.argv[1]))
store.put("before", b"small")
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    store.put("after", bytes(100_000))
except Exception as error:
    print(f"{type(error).__name__}: {error}")
store.put("before", b"still works")
"""
ON_SMALL_DISK = """
import sys
from infra.local_storage import LocalStorage
from pathlib import Path
store = LocalStorage(Path(sys.argv[1]))
info = store.put("before", b"small")
for put in (lambda: store.put("after", bytes(2_000_000)), lambda: store.compare_and_put("before", bytes(2_000_000), info.etag)):
    try:
        put()
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
print([info.key for info in store.list("")], store.get("before")[0], len(list((store.root / ".~lorafleet/tmp").iterdir())))
"""
PUT_FOR_EVER = """
import sys
from infra.local_storage import LocalStorage
from pathlib import Path
store = LocalStorage(Path(sys.argv[1]))
print("ready", flush=True)
number = 0
while True:
    store.put("object", bytes([number % 256]) * 300_000)
    store.put_if_absent(f"objects/{number}", bytes([number % 256]) * 300_000)
    number += 1
"""


def what_it_says(act: Callable[[], object]) -> str:
    """The one sentence; no secret may stand in it, or in what a pickle of the error carries to a driver."""
    with pytest.raises(LorafleetError) as caught:
        act()
    sentence = str(caught.value)
    assert len(caught.value.args) == 1
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert SECRET_KEY.encode() not in pickle.dumps(caught.value)
    return sentence


def run_python(script: str, *arguments: object, before: tuple[str, ...] = ()) -> str:
    command = [*before, sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_a_server_that_ignores_conditions_is_refused(rclone: S3Server) -> None:
    store = S3Storage(f"s3://{rclone.new_bucket()}", endpoint_url=rclone.url)
    sentence = what_it_says(lambda: probe(store))
    assert sentence.startswith(f"the store {store.uri} ignores If-None-Match; lorafleet cannot claim or promote on it; use ")
    assert list(store.list("")) == []


def test_wrong_credentials_are_named_without_the_secret(rclone: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"s3://{rclone.new_bucket()}"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
    sentence = what_it_says(lambda: probe(S3Storage(uri, endpoint_url=rclone.url)))
    assert sentence.startswith(f"the store {uri} refuses these credentials (SignatureDoesNotMatch); correct or renew them")
    assert "a-wrong-secret" not in sentence
    assert "no permission" in what_it_says(lambda: S3Storage(uri, endpoint_url=rclone.url).head("a"))


def test_missing_credentials_are_asked_for(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    sentence = what_it_says(lambda: probe(S3Storage(f"s3://{moto.new_bucket()}", endpoint_url=moto.url)))
    assert "needs credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in sentence


def test_a_bucket_that_does_not_exist_is_named(moto: S3Server) -> None:
    sentence = what_it_says(lambda: probe(S3Storage("s3://no-such-bucket/prefix", endpoint_url=moto.url)))
    assert sentence.startswith("the store s3://no-such-bucket/prefix names a bucket that does not exist; create it")


def test_an_endpoint_that_does_not_answer_is_named() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    sentence = what_it_says(lambda: probe(S3Storage("s3://bucket", endpoint_url=url, retry_seconds=0.3)))
    assert sentence.startswith(f"the store s3://bucket does not answer at {url} (EndpointConnectionError); check the endpoint")


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("", "has no name"),
        ("gs://bucket", "gs://… is of no known kind; expected a path, file:// or s3://"),
        ("s3://", "expected s3://bucket"),
        ("s3://Bad_Bucket/x", "expected s3://bucket"),
        ("s3://bucket/../x", "not a key"),
        (f"s3://key:{SECRET_KEY}@bucket/x", "holds credentials"),
    ],
)
def test_names_that_are_no_stores_are_refused(uri: str, says: str) -> None:
    assert says in what_it_says(lambda: open_store(uri))


def test_an_endpoint_with_a_password_in_it_is_refused() -> None:
    assert "without user and password" in what_it_says(
        lambda: open_store("s3://bucket", endpoint_url=f"http://a:{SECRET_KEY}@host")
    )


def test_a_folder_is_a_store_by_path_and_by_file_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "with space"
    open_store(str(folder)).put("a", b"content")
    assert (folder / "a").read_bytes() == b"content"
    assert open_store(folder.as_uri()).get("a")[0] == b"content"
    monkeypatch.chdir(tmp_path)
    store = open_store("with space")
    monkeypatch.chdir("/")
    assert store.get("a")[0] == b"content"
    assert store.uri == str(folder)


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is a file; name a folder" in what_it_says(lambda: open_store(str(tmp_path / "file")))


def test_opening_a_folder_does_not_load_boto3(tmp_path: Path) -> None:
    script = "import sys; from infra.stores import open_store; open_store(sys.argv[1]); print('boto3' in sys.modules)"
    assert run_python(script, tmp_path).strip() == "False"


def test_objects_below_an_object_are_refused(local_store: LocalStorage) -> None:
    local_store.put("a", b"")
    assert "a/b cannot be an object" in what_it_says(lambda: local_store.put("a/b", b""))
    local_store.put("c/d", b"")
    assert "c cannot be an object" in what_it_says(lambda: local_store.put("c", b""))
    local_store.delete("c/d")
    local_store.put("c", b"free again")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder whose parents anybody may enter, as pytest's own may not."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(os.path.realpath(folder))


def test_a_folder_without_permission_is_named(open_folder: Path) -> None:
    folder = open_folder / "store"
    folder.mkdir()
    folder.chmod(0o555)
    said = run_python(AS_NOBODY, folder)
    assert said.startswith("ServiceUnavailable: no permission to write ")
    assert f"in store {folder}; grant it, or name another place." in said
    folder.chmod(0o400)
    said = run_python(AS_NOBODY, folder / "below")
    assert (
        said.strip()
        == f"ServiceUnavailable: no permission to look at the store {folder / 'below'}; grant it, or name another place."
    )


def test_a_file_that_may_not_grow_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    said = run_python(WITH_SMALL_FILES, tmp_path)
    assert said.startswith(f"ServiceUnavailable: a file in store {tmp_path} may not grow so large; raise the file size limit")
    store = LocalStorage(tmp_path)
    assert [info.key for info in store.list("")] == ["before"]
    assert store.get("before")[0] == b"still works"
    assert list((tmp_path / HIDDEN / "tmp").iterdir()) == []


def test_a_full_disk_leaves_everything_as_it_was_and_says_so(tmp_path: Path) -> None:
    """On a disk of one megabyte, mounted in a name space that ends with the process."""
    small_disk = ("unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=1m tmpfs {tmp_path} && exec "$@"', "sh")
    try:
        subprocess.run([*small_disk, "true"], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this system lets no process mount a disk of its own: {error}")
    *said, left = run_python(ON_SMALL_DISK, tmp_path, before=small_disk).splitlines()
    assert said == [f"ServiceUnavailable: the disk of store {tmp_path} is full; free space and run the same command again."] * 2
    assert left == "['before'] b'small' 0"


def test_a_writer_killed_at_any_moment_leaves_whole_objects_only(tmp_path: Path) -> None:
    for round_ in range(4):
        root = tmp_path / str(round_)
        store = LocalStorage(root)
        process = subprocess.Popen([sys.executable, "-c", PUT_FOR_EVER, str(root)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        while len(list(store.list("objects/"))) < 3 + round_:
            pass
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for info in store.list(""):
            content, _ = store.get(info.key)
            assert len(content) == 300_000
            assert len(set(content)) == 1
        store.put("object", b"goes on")


def test_what_killed_writers_left_is_removed_after_a_day(local_store: LocalStorage) -> None:
    local_store.put("a", b"content")
    temporaries = local_store.root / HIDDEN / "tmp"
    (temporaries / "old").write_bytes(b"half")
    (temporaries / "young").write_bytes(b"half")
    os.utime(temporaries / "old", (0, 0))
    open_store(local_store.uri)
    assert [path.name for path in temporaries.iterdir()] == ["young"]
    assert [info.key for info in local_store.list("")] == ["a"]


def test_a_stopped_process_that_holds_a_lock_is_told_from_a_slow_one(
    local_store: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.local_storage.LOCK_TIMEOUT_SECONDS", 0.2)
    with local_store._locked("a"):
        assert "continue or end that process" in what_it_says(lambda: local_store.put("a", b""))
    local_store.put("a", b"")
