"""One suite for every store: a folder, two S3 servers, and both servers behind a network that loses and tears answers."""

import hashlib
import pickle
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.errors import BadInput, ConditionFailed, ObjectNotFound, ServiceUnavailable, WorkFailed
from infra.local_storage import LocalStorage
from infra.s3 import S3Storage
from infra.storage import Storage
from infra.stores import open_store, probe
from tests.contracts.storage_servers import S3Server
from tests.faulty_proxy import FaultyProxy

PART_BYTES = 5 << 20  # the least that S3 allows
FAULTS = {"drop_answer": 0.1, "cut_body": 0.1, "delay": 0.01}
BACK_ENDS = ["local", "moto", "ministack", "moto-faulty", "ministack-faulty"]


@dataclass(frozen=True)
class BackEnd:
    """A store under test and what a test may do behind its back."""

    store: Storage
    damage: Callable[[str], None]
    """Change the content of an object and nothing else."""
    checks_sha256: bool = False


@pytest.fixture(params=BACK_ENDS)
def back_end(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BackEnd]:
    name, _, faulty = request.param.partition("-")
    if name == "local":
        store = LocalStorage(tmp_path / "store")
        yield BackEnd(store, lambda key: damage_file(store.root / key))
        return
    server: S3Server = request.getfixturevalue(name)
    bucket = server.new_bucket()
    with ExitStack() as stack:
        url = server.url
        if faulty:
            seed = int(hashlib.sha256(request.node.name.encode()).hexdigest()[:8], 16)
            url = stack.enter_context(FaultyProxy("127.0.0.1", server.port, seed=seed, **FAULTS)).url
        s3 = S3Storage(f"s3://{bucket}/some/prefix", endpoint_url=url, multipart_bytes=PART_BYTES, page_size=3)
        yield BackEnd(s3, lambda key: damage_s3(server, bucket, f"some/prefix/{key}"), server.checks_sha256)


@pytest.fixture
def store(back_end: BackEnd) -> Storage:
    return back_end.store


def damage_file(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_s3(server: S3Server, bucket: str, key: str) -> None:
    stored = server.client.get_object(Bucket=bucket, Key=key)
    content = bytearray(stored["Body"].read())
    content[len(content) // 2] ^= 1
    server.client.put_object(Bucket=bucket, Key=key, Body=bytes(content), Metadata=stored["Metadata"])


def test_what_was_put_is_read_back_with_its_digest(store: Storage) -> None:
    for content in (b"", b"\r\n", bytes(range(256)) * 40, "žluťoučký 🐎".encode()):
        info = store.put("a/b.bin", content)
        assert store.get("a/b.bin") == (content, store.head("a/b.bin"))
        assert (info.key, info.size_bytes, info.sha256) == ("a/b.bin", len(content), hashlib.sha256(content).hexdigest())


def test_a_missing_object_is_none_or_not_found_and_may_be_deleted(store: Storage, tmp_path: Path) -> None:
    assert store.head("a/b") is None
    with pytest.raises(ObjectNotFound, match="a/b"):
        store.get("a/b")
    with pytest.raises(ObjectNotFound, match="a/b"):
        store.download("a/b", tmp_path / "target" / "file")
    assert list((tmp_path / "target").glob("*")) == []
    store.delete("a/b")


def test_a_deleted_object_is_gone_and_its_key_free(store: Storage) -> None:
    store.put("a/b", b"old")
    store.put("a/c", b"neighbour")
    store.delete("a/b")
    assert store.head("a/b") is None
    assert [info.key for info in store.list("")] == ["a/c"]
    store.put_if_absent("a/b", b"new")
    assert store.get("a/b")[0] == b"new"


def test_neighbours_may_be_deleted_at_the_same_time(store: Storage) -> None:
    for number in range(4):
        keys = [f"a/{number}/{name}" for name in "abcdefgh"]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: store.put(key, b"x"), keys))
            list(pool.map(store.delete, keys))
    assert list(store.list("")) == []


def test_put_if_absent_refuses_what_is_there_and_leaves_it(store: Storage) -> None:
    store.put_if_absent("a", b"first")
    with pytest.raises(ConditionFailed, match="a"):
        store.put_if_absent("a", b"second")
    assert store.get("a")[0] == b"first"


def test_compare_and_put_wants_the_etag_that_stands_there(store: Storage) -> None:
    first = store.put_if_absent("a", b"first")
    second = store.compare_and_put("a", b"second", first.etag)
    with pytest.raises(ConditionFailed, match="a"):
        store.compare_and_put("a", b"rival", first.etag)
    with pytest.raises(ConditionFailed, match="missing"):
        store.compare_and_put("missing", b"rival", second.etag)
    assert store.get("a")[0] == b"second"
    assert store.head("missing") is None


def test_every_way_of_asking_gives_the_same_etag(store: Storage) -> None:
    put = store.put("a", b"content")
    head, (_, got), (listed,) = store.head("a"), store.get("a"), store.list("")
    assert head is not None
    assert {put.etag, head.etag, got.etag, listed.etag} == {put.etag}
    assert head == got
    assert abs(put.modified - head.modified) < 60


@pytest.mark.parametrize("num_bytes", [1000, 10_000_000])
def test_files_go_in_and_out_unchanged(store: Storage, tmp_path: Path, num_bytes: int) -> None:
    source, target = tmp_path / "source", tmp_path / "deep" / "target"
    content = hashlib.shake_256(b"seed").digest(num_bytes)
    source.write_bytes(content)
    info = store.put("files/f", source)
    assert (info.size_bytes, info.sha256) == (num_bytes, hashlib.sha256(content).hexdigest())
    store.download("files/f", target)
    assert target.read_bytes() == content
    assert list(target.parent.iterdir()) == [target]


def test_a_file_that_is_not_there_is_bad_input(store: Storage, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no-such-file"):
        store.put("a", tmp_path / "no-such-file")
    assert store.head("a") is None


def test_lists_come_in_key_order_whole_and_by_prefix(store: Storage) -> None:
    keys = sorted(["b/1", "a-b", "a/b/c", "a/b.d", "a/bc", "a.b", "a/b-1/x", "A", "b/2", "b+@=_/x"])
    for key in reversed(keys):
        store.put(key, key.encode())
    assert [(info.key, info.size_bytes) for info in store.list("")] == [(key, len(key)) for key in keys]
    for prefix in ("a", "a/", "a/b", "a/b/", "b/2", "c", "b+@"):
        assert [info.key for info in store.list(prefix)] == [key for key in keys if key.startswith(prefix)]


def test_what_is_no_key_is_refused(store: Storage) -> None:
    for key in (
        "",
        "/a",
        "a/",
        "a//b",
        "../a",
        "a/../b",
        "./a",
        "a b",
        "ä",
        "a\n",
        "a\\b",
        ".~lorafleet/locks/00",
        "x" * 201,
        "x/" * 460 + "x",
    ):
        with pytest.raises(BadInput, match="not a key"):
            store.put(key, b"")
        with pytest.raises(BadInput, match="not a key"):
            store.get(key)
    with pytest.raises(BadInput, match="not a key"):
        list(store.list("../"))
    assert list(store.list("")) == []


def test_of_many_who_put_if_absent_exactly_one_wins(store: Storage) -> None:
    def try_to_win(number: int) -> bool:
        try:
            store.put_if_absent("prize", f"writer {number}".encode())
        except ConditionFailed:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(try_to_win, range(8)))
    assert wins.count(True) == 1
    assert store.get("prize")[0] == f"writer {wins.index(True)}".encode()


def test_increments_by_compare_and_put_from_sixteen_threads_add_up(store: Storage) -> None:
    """Each increment leaves its own mark: a put that won unseen and was then overtaken is found by it."""
    num_threads, num_each = 16, 8 if isinstance(store, LocalStorage) else 1
    store.put("counter", b"")

    def increment(mark: str) -> None:
        while True:
            content, info = store.get("counter")
            if mark in content.decode().split():
                return
            try:
                store.compare_and_put("counter", content + f" {mark}".encode(), info.etag)
                return
            except ConditionFailed:
                continue

    marks = [uuid.uuid4().hex for _ in range(num_threads * num_each)]
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(increment, marks))
    assert sorted(store.get("counter")[0].decode().split()) == sorted(marks)


def test_a_pickled_store_works_in_another_process(store: Storage, tmp_path: Path) -> None:
    store.put("a", b"from here")
    (tmp_path / "pickle").write_bytes(pickle.dumps(store))
    script = (
        "import pickle, sys\n"
        "store = pickle.load(open(sys.argv[1], 'rb'))\n"
        "content, info = store.get('a')\n"
        "store.compare_and_put('a', content + b' and there', info.etag)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "pickle")], check=True, timeout=120)
    assert store.get("a")[0] == b"from here and there"
    assert pickle.loads(pickle.dumps(store)).uri == store.uri  # noqa: S301


def test_a_damaged_object_is_never_returned(back_end: BackEnd, tmp_path: Path) -> None:
    store = back_end.store
    store.put("a/b", b"0123456789")
    back_end.damage("a/b")
    with pytest.raises(WorkFailed, match="a/b .*is damaged"):
        store.get("a/b")
    with pytest.raises(WorkFailed, match="a/b .*is damaged"):
        store.download("a/b", tmp_path / "target" / "file")
    assert list((tmp_path / "target").iterdir()) == []
    store.put("a/b", b"whole again")
    assert store.get("a/b")[0] == b"whole again"


def test_a_server_that_claims_to_check_uploads_refuses_a_wrong_digest(back_end: BackEnd) -> None:
    if not isinstance(back_end.store, S3Storage):
        pytest.skip("a folder has no uploads")
    assert back_end.store.refuses_wrong_checksum("probes/checksum") == back_end.checks_sha256
    assert list(back_end.store.list("")) == []


def test_the_probe_accepts_the_store_and_leaves_nothing(store: Storage) -> None:
    probe(store)
    assert list(store.list("")) == []


def test_a_store_is_found_again_by_its_uri(back_end: BackEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    store = back_end.store
    store.put("a", b"content")
    if isinstance(store, S3Storage):
        assert store.endpoint_url is not None
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint_url)
    assert open_store(store.uri).get("a")[0] == b"content"


@pytest.fixture
def proxied(moto: S3Server) -> Iterator[tuple[FaultyProxy, S3Storage, S3Storage]]:
    """A proxy without faults yet, a store behind it, and the same store without it."""
    uri = f"s3://{moto.new_bucket()}"
    with FaultyProxy("127.0.0.1", moto.port, seed=0) as proxy:
        yield proxy, S3Storage(uri, endpoint_url=proxy.url, retry_seconds=20), S3Storage(uri, endpoint_url=moto.url)


def test_a_put_whose_answers_were_lost_is_known_to_have_won(proxied: tuple[FaultyProxy, S3Storage, S3Storage]) -> None:
    proxy, store, direct = proxied
    proxy.lose_next(2)
    first = store.put_if_absent("a", b"first")
    assert direct.get("a") == (b"first", first)
    proxy.lose_next(2)
    second = store.compare_and_put("a", b"second", first.etag)
    assert direct.get("a") == (b"second", second)
    assert proxy.num_faults["drop"] == 4


def test_a_put_whose_answers_were_lost_is_known_to_have_been_refused(proxied: tuple[FaultyProxy, S3Storage, S3Storage]) -> None:
    proxy, store, direct = proxied
    stale = direct.put("a", b"stale")
    direct.put("a", b"rival")
    proxy.lose_next(2)
    with pytest.raises(ConditionFailed, match="a"):
        store.put_if_absent("a", b"ours")
    proxy.lose_next(2)
    with pytest.raises(ConditionFailed, match="a"):
        store.compare_and_put("a", b"ours", stale.etag)
    assert direct.get("a")[0] == b"rival"


def test_an_answer_torn_anywhere_is_not_believed(proxied: tuple[FaultyProxy, S3Storage, S3Storage]) -> None:
    proxy, store, direct = proxied
    for kept_bytes in range(5, 700, 47):
        content = f"content {kept_bytes}".encode()
        proxy.cut_next(kept_bytes)
        store.put("a", content)
        expected = direct.head("a")
        assert expected is not None
        for read in (lambda: store.get("a")[1], lambda: store.head("a"), lambda: next(store.list(""))):
            proxy.cut_next(kept_bytes)
            found = read()
            assert found is not None
            assert (found.size_bytes, found.etag, found.modified) == (len(content), expected.etag, expected.modified)
            assert found.sha256 in (expected.sha256, None)


def test_a_network_that_stays_broken_is_given_up_in_one_sentence(moto: S3Server) -> None:
    with FaultyProxy("127.0.0.1", moto.port, seed=0, drop_answer=1.0) as proxy:
        store = S3Storage(f"s3://{moto.new_bucket()}", endpoint_url=proxy.url, retry_seconds=0.5)
        for act in (lambda: store.get("a"), lambda: store.put("a", b""), lambda: list(store.list(""))):
            with pytest.raises(ServiceUnavailable, match="does not answer at http://127.0.0.1"):
                act()
    with pytest.raises(ServiceUnavailable, match="does not answer"):
        store.put("a", b"")  # now nobody listens
