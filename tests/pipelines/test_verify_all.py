"""No damage goes unseen: flipped bits and cut ends of every kind of object are found by verify, and refused where it is read."""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.claims import read_document
from infra.errors import BadInput, LorafleetError
from infra.fingerprint import id_of_json
from infra.local_storage import HIDDEN, LocalStorage
from infra.records import decode_record, encode_record
from pipelines.contents import check_object
from pipelines.journal import Candidate, Change, candidates, commit, history, register_candidate
from pipelines.verify import check_adapter, check_base_record, verify_all
from sweeps.ledger import read_trials
from sweeps.trial import TRIAL_FORMAT, Trial
from tests.pipelines.command_line import CommandLine, installation
from tests.pipelines.conftest import Trained
from workers import layout
from workers.adapter_store import load_adapter
from workers.bases import add_base, materialise, read_base
from workers.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from workers.data.store import load_rows
from workers.identity import identify
from workers.job import JOB_FORMAT, Job
from workers.job_state import STATE_FORMAT
from workers.manifests import AdapterRef, read_manifest
from workers.metrics_log import decode_points

PER_KIND = 63
"""Flips, and as many truncations, of each of the 16 kinds: more than 1,000 of either."""
SEED = 20261123


@dataclass(frozen=True)
class Stored:
    """A small real store with an object of every kind, and how each is read."""

    store: LocalStorage
    trained: Trained
    objects: dict[str, str]
    """Key by kind."""

    @property
    def ref(self) -> AdapterRef:
        return AdapterRef("acme", self.trained.base_id, self.trained.adapter_id)

    def check(self, kind: str) -> None:
        """Do what `verify --all --read-data` does with an object."""
        check_adapter(self.store, self.ref) if kind in ("manifest", "weights", "config") else check_object(
            self.store, self.objects[kind]
        )

    def load(self, kind: str) -> Any:
        """Read an object as whoever works with it does."""
        store, key = self.store, self.objects[kind]
        loaders: dict[str, Callable[[], Any]] = {
            "manifest": lambda: load_adapter(store, *self.ref),
            "weights": lambda: load_adapter(store, *self.ref),
            "config": lambda: load_adapter(store, *self.ref),
            "rows": lambda: load_rows(store, "acme", key.split("/")[3]),
            "data record": lambda: load_rows(store, "acme", key.split("/")[3]),
            "base record": lambda: read_base(store, self.trained.base_id),
            "base weights": lambda: store.download(key, store.root.parent / "fetched"),
            "journal": lambda: history(store, "acme", "menus"),
            "candidate": lambda: candidates(store, "acme", "menus"),
            "job state": lambda: read_document(store, key, STATE_FORMAT),
            "job spec": lambda: Job.from_json(decode_record(store.get(key)[0], JOB_FORMAT, key)),
            "checkpoint": lambda: load_checkpoint(store, key.rpartition("/")[0] + "/"),
            "standing": lambda: load_checkpoint(store, key.rpartition("/")[0] + "/"),
            "chunk": lambda: decode_points(store.get(key)[0]),
            "evidence": lambda: store.get(key),
            "trial": lambda: read_trials(store, "acme", "first"),
        }
        return loaders[kind]()


KINDS = (
    "manifest",
    "weights",
    "config",
    "rows",
    "data record",
    "base record",
    "base weights",
    "journal",
    "candidate",
    "job state",
    "job spec",
    "checkpoint",
    "standing",
    "chunk",
    "evidence",
    "trial",
)


@pytest.fixture(scope="module")
def stored(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    folder = tmp_path_factory.mktemp("stored")
    shutil.copytree(trained.folder / ".lorafleet" / "store", folder / "store")
    store = LocalStorage(folder / "store")
    return Stored(store, trained, {**_keys_of_training(store, trained), **_fill(store, trained)})


def _keys_of_training(store: LocalStorage, trained: Trained) -> dict[str, str]:
    ref = ("acme", trained.base_id, trained.adapter_id)
    job = ("acme", trained.base_id, trained.job_id)
    train = read_manifest(store, AdapterRef(*ref))["data"]["train"]
    state = read_document(store, layout.job_state(*job), STATE_FORMAT)
    assert state is not None
    return {
        "manifest": layout.manifest(*ref),
        "weights": f"{layout.adapter(*ref)}adapter_model.safetensors",
        "config": f"{layout.adapter(*ref)}adapter_config.json",
        "rows": f"{layout.data('acme', train)}rows.jsonl",
        "data record": f"{layout.data('acme', train)}data.json",
        "base record": layout.base(trained.base_id),
        "job state": layout.job_state(*job),
        "job spec": layout.job_spec(*job),
        "chunk": state.body["chunks"][0],
    }


def _fill(store: LocalStorage, trained: Trained) -> dict[str, str]:
    """Put what training alone leaves none of."""
    adapter_id, base_id = trained.adapter_id, trained.base_id
    add_base(store, trained.base, identify(trained.base), upload=True)
    register_candidate(store, "acme", "menus", Candidate(adapter_id, base_id, trained.job_id, None, {"eval/loss": 1.5}, 1.0))
    body = {"kind": "evaluation", "adapter_id": adapter_id, "scores": [0.5, 1e-7]}
    evidence = layout.evidence("acme", adapter_id, id_of_json(body))
    store.put(evidence, encode_record("evidence/1", body))
    change = Change(
        kind="promote", adapter_id=adapter_id, base_id=base_id, evidence=(evidence,), actor="ann", reason="first", previous=None
    )
    commit(store, "acme", "menus", change, 0)
    prefix = f"{layout.attempt('acme', base_id, trained.job_id, 1)}checkpoints/00000002/"
    vectors = {"moments": torch.arange(64.0), "weights": torch.ones(32)}
    save_checkpoint(store, prefix, Checkpoint(vectors, {"step": 2}))
    trial = Trial(0, {"peft.r": 4}, "complete", (), 1, trained.job_id, values=(1.5,), adapter_id=adapter_id)
    store.put(layout.trial("acme", "first", 0), encode_record(TRIAL_FORMAT, trial.to_json()))
    [weights] = [info.key for info in store.list(layout.base_files(base_id)) if info.key.endswith("model.safetensors")]
    return {
        "base weights": weights,
        "journal": layout.journal("acme", "menus", 1),
        "candidate": layout.candidate("acme", "menus", adapter_id),
        "checkpoint": f"{prefix}state.safetensors",
        "standing": f"{prefix}standing.json",
        "evidence": evidence,
        "trial": layout.trial("acme", "first", 0),
    }


@dataclass(frozen=True)
class Damage:
    """Changes the file of an object, and puts it back."""

    path: Path
    whole: bytes
    times: tuple[int, int]

    @staticmethod
    def of(path: Path) -> "Damage":
        status = path.stat()
        return Damage(path, path.read_bytes(), (status.st_atime_ns, status.st_mtime_ns))

    def flips(self, rng: random.Random, count: int) -> Iterator[str]:
        """Flip one bit after the other, each alone; `count` of them, wherever the file has them."""
        with self.path.open("r+b") as file:
            for bit in (rng.randrange(len(self.whole) * 8) for _ in range(count)):
                self._put(file, bit // 8, self.whole[bit // 8] ^ (1 << bit % 8))
                yield f"bit {bit}"
                self._put(file, bit // 8, self.whole[bit // 8])

    def _put(self, file: Any, place: int, value: int) -> None:
        file.seek(place)
        file.write(bytes([value]))
        file.flush()
        os.utime(self.path, ns=self.times)  # a disk that rots tells nobody

    def truncations(self, rng: random.Random, count: int) -> Iterator[str]:
        """Cut the file at one length after the other, none at all among them."""
        for length in [0, *(rng.randrange(len(self.whole)) for _ in range(count - 1))]:
            os.truncate(self.path, length)
            yield f"{length} of {len(self.whole)} bytes"
            self.restore()

    def restore(self) -> None:
        """Make the file what it was."""
        with self.path.open("r+b") as file:
            file.write(self.whole)
        os.utime(self.path, ns=self.times)


def is_refused(read: Callable[[], object]) -> bool:
    """Tell whether reading ends with one of our sentences; anything else but a result is an error of the test."""
    try:
        read()
    except LorafleetError as error:
        return "\n" not in str(error)
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_single_bits_and_cut_ends_are_found_before_anything_is_loaded(stored: Stored, kind: str) -> None:
    rng = random.Random(f"{SEED} {kind}")
    damage = Damage.of(stored.store.root / stored.objects[kind])
    for damages in (damage.flips(rng, PER_KIND), damage.truncations(rng, PER_KIND)):
        for told in damages:
            assert is_refused(lambda: stored.check(kind)), f"seed {SEED}: verify passed {kind} with {told}"
            assert is_refused(lambda: stored.load(kind)), f"seed {SEED}: {kind} was loaded with {told}"
    stored.check(kind)
    stored.load(kind)


WHOLLY_COVERED = ("weights", "config", "rows", "base weights", "checkpoint")
"""What stands under its digest with every bit; of records the version of the format does not."""


def test_whole_store_is_whole(stored: Stored) -> None:
    found = verify_all(stored.store, read_data=True)
    assert found.ok, found
    assert found.num_objects == len(list(stored.store.list(""))) - 3, "all but the three objects that are the adapter"
    check_base_record(stored.store, stored.trained.base_id)


@pytest.mark.parametrize(
    "kind", ["weights", "config", "rows", "base weights", "checkpoint", "evidence", "base record", "data record"]
)
def test_store_copied_without_its_notes_is_checked_by_its_contents(stored: Stored, tmp_path: Path, kind: str) -> None:
    """Whoever copies the folders of a store and not what is hidden in it loses the digests of its objects."""
    shutil.copytree(stored.store.root, tmp_path / "copy", ignore=shutil.ignore_patterns(HIDDEN))
    copy = Stored(LocalStorage(tmp_path / "copy"), stored.trained, stored.objects)
    rng = random.Random(f"{SEED} {kind}")
    path = copy.store.root / copy.objects[kind]
    damage = Damage.of(path)
    for told in damage.truncations(rng, 20):
        assert is_refused(lambda: copy.check(kind)), told
    for told in damage.flips(rng, 40 if kind in WHOLLY_COVERED else 0):
        assert is_refused(lambda: copy.check(kind)), told
    copy.check(kind)


def test_base_is_not_fetched_from_a_damaged_upload(stored: Stored, tmp_path: Path) -> None:
    damage = Damage.of(stored.store.root / stored.objects["base weights"])
    for _ in damage.flips(random.Random(SEED), 3):
        with pytest.raises(LorafleetError, match="damaged"):
            materialise(stored.trained.base_id, None, stored.store, tmp_path)
    assert list((tmp_path / "bases").glob("*/*")) == []


@pytest.fixture
def copied(stored: Stored, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[CommandLine]:
    """The command line on a copy of the store."""
    shutil.copytree(stored.store.root, tmp_path / ".lorafleet" / "store")
    with installation(tmp_path):
        yield CommandLine(tmp_path, capsys)


@pytest.mark.parametrize("kind", ["manifest", "weights", "rows", "journal", "base record", "job state"])
def test_command_lists_what_is_damaged(copied: CommandLine, stored: Stored, kind: str) -> None:
    assert copied("adapters", "verify", "--all", "--read-data").code == 0
    path = copied.store.root / stored.objects[kind]
    data = path.read_bytes()
    path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    ended = copied("adapters", "verify", "--all", "--read-data", "--json")
    assert ended.code == 1
    wrong = [row for row in ended.json if not row["ok"]]
    about_adapter = kind in ("manifest", "weights", "base record")
    assert [row["adapter_id"] for row in wrong][:1] == [stored.trained.adapter_id if about_adapter else None]
    assert any(stored.objects[kind] in row["problem"] for row in wrong)
    assert copied("adapters", "verify", "--all").code == (1 if about_adapter else 0), "without --read-data adapters are read"
    assert "DAMAGED" in copied("adapters", "verify", "--all", "--read-data").out


def test_damaged_adapter_is_neither_promoted_nor_measured(copied: CommandLine, stored: Stored) -> None:
    path = copied.store.root / stored.objects["weights"]
    path.write_bytes(path.read_bytes()[:-1])
    for command in (["promote"], ["evaluate"], ["generate"]):
        ended = copied(*command, stored.trained.adapter_id)
        assert ended.code in (1, 2)
        assert "damaged" in ended.sentence


def test_adapter_without_the_record_of_its_base_is_told(copied: CommandLine, stored: Stored) -> None:
    copied.store.delete(stored.objects["base record"])
    ended = copied("adapters", "verify", "--all")
    assert ended.code == 1
    assert "run 'lorafleet base add' with its folder" in ended.out


def test_manifest_that_describes_other_files_is_told(copied: CommandLine, stored: Stored) -> None:
    key = stored.objects["manifest"]
    body = decode_record(copied.store.get(key)[0], "manifest/1", key)
    copied.store.put(key, encode_record("manifest/1", body | {"peft": body["peft"] | {"lora_alpha": 400}}))
    with pytest.raises(BadInput, match="describes another configuration"):
        check_adapter(copied.store, stored.ref)


def test_reading_all_data_is_for_all_adapters(cli: CommandLine) -> None:
    assert "give --all with it" in cli("adapters", "verify", "abcd", "--read-data").sentence
