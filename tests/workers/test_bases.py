"""Bases are found, loaded, uploaded and fetched by content; a folder that holds something else is refused."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.errors import BadInput, ServiceUnavailable, WorkFailed, WrongBase
from infra.local_storage import LocalStorage
from tests.workers.tiny_bases import FAMILIES, copy_with_config, logits, make_base, make_model, save
from workers import layout
from workers.bases import add_base, find_base, materialise, read_base, read_listing, verify_base
from workers.identity import describe_base, identify
from workers.loading import load_model
from workers.spec import BaseModelSpec

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FLOAT32 = BaseModelSpec(name_or_path="x")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_base(tmp_path_factory.mktemp("bases") / "llama")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_base_is_frozen_and_gives_the_logits_it_was_saved_with(
    tmp_path: Path, family: str, capfd: pytest.CaptureFixture[str]
) -> None:
    make_base(tmp_path, family)
    model = load_model(tmp_path, FLOAT32)
    assert torch.equal(logits(model), logits(make_model(family)))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert load_model(tmp_path, BaseModelSpec(name_or_path="x", dtype="bfloat16")).dtype == torch.bfloat16
    assert capfd.readouterr() == ("", "")


def test_base_saved_without_its_head_class_loads_in_a_causal_model(tmp_path: Path) -> None:
    model = make_model("qwen2")
    save(model.model, tmp_path)
    assert torch.equal(logits(load_model(tmp_path, FLOAT32)), logits(model))


def test_missing_weights_are_refused_rather_than_made_up(base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"has no weights for model.layers.1.mlp.up_proj.weight \(1 such tensors\)"):
        load_model(copy, FLOAT32)


def test_weights_of_other_shapes_than_the_configuration_are_refused(base: Path, tmp_path: Path) -> None:
    copy = copy_with_config(base, tmp_path / "copy", lambda raw: raw.update(intermediate_size=64))
    with pytest.raises(BadInput, match="cannot load the base"):
        load_model(copy, FLOAT32)


def test_unknown_model_types_are_refused(base: Path, tmp_path: Path) -> None:
    copy = copy_with_config(base, tmp_path / "copy", lambda raw: raw.update(model_type="unheard_of"))
    with pytest.raises(BadInput, match="cannot load the base .* as a causal language model"):
        load_model(copy, FLOAT32)


def test_base_is_found_beside_the_job_file_then_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("jobs/base", "here/base", "here/other"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert find_base(BaseModelSpec(name_or_path="base"), tmp_path / "jobs") == tmp_path / "jobs" / "base"
    assert find_base(BaseModelSpec(name_or_path="other"), tmp_path / "jobs") == tmp_path / "here" / "other"
    with pytest.raises(BadInput, match="there is no base folder .*jobs/nowhere or .*here/nowhere; correct"):
        find_base(BaseModelSpec(name_or_path="./nowhere"), Path("../jobs"))


@pytest.mark.parametrize("revision", [None, "main", COMMIT[:39]])
def test_hub_base_needs_a_pinned_commit(tmp_path: Path, revision: str | None) -> None:
    with pytest.raises(BadInput, match="needs a pinned commit; set base_model.revision to 40 hexadecimal digits"):
        find_base(BaseModelSpec(name_or_path="org/model", revision=revision), tmp_path)


class _Hub(BaseHTTPRequestHandler):
    """Answers the two requests a snapshot needs, for one model of files in memory."""

    files: dict[str, bytes] = {}
    served: list[str] = []

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        name = path.rpartition(f"/resolve/{COMMIT}/")[2]
        if path.startswith("/api/models/org/model"):
            body = json.dumps({"id": "org/model", "sha": COMMIT, "siblings": [{"rfilename": one} for one in self.files]}).encode()
            if "/tree/" in path:
                body = json.dumps(
                    [{"type": "file", "path": one, "size": len(data), "oid": "0"} for one, data in self.files.items()]
                ).encode()
        elif path.startswith("/org/model/") and name in self.files:
            body = self.files[name]
            if with_body:
                self.served.append(name)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def hub(base: Path) -> Iterator[str]:
    _Hub.files = {path.name: path.read_bytes() for path in base.iterdir()} | {
        "pytorch_model.bin": b"pickle",
        "onnx/model.safetensors": b"",
    }
    _Hub.served = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


FIND = """
import sys
from pathlib import Path
from infra.errors import LorafleetError
from workers.bases import find_base
from workers.identity import identify
from workers.spec import BaseModelSpec
try:
    print(identify(find_base(BaseModelSpec(name_or_path=sys.argv[1], revision=sys.argv[2]), Path("."))).base_id)
except LorafleetError as error:
    print(type(error).__name__, error)
assert "torch" not in sys.modules
"""


def _find_in_new_process(endpoint: str, home: Path, name: str) -> str:
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    run = subprocess.run([sys.executable, "-c", FIND, name, COMMIT], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return run.stdout.strip()


def test_hub_base_is_downloaded_without_its_pickles(hub: str, base: Path, tmp_path: Path) -> None:
    assert _find_in_new_process(hub, tmp_path, "org/model") == identify(base).base_id
    assert sorted(_Hub.served) == sorted(path.name for path in base.iterdir())
    assert _find_in_new_process(hub, tmp_path, "org/unheard-of").startswith("BadInput the hub knows no model 'org/unheard-of'")


def test_hub_that_does_not_answer_is_a_service_that_is_not_reachable(tmp_path: Path) -> None:
    said = _find_in_new_process("http://127.0.0.1:9", tmp_path, "org/model")
    assert said.startswith(f"{ServiceUnavailable.__name__} the model hub did not answer for 'org/model'")


def test_descriptor_is_written_once_and_files_only_on_upload(local_store: LocalStorage, base: Path) -> None:
    identity = identify(base)
    add_base(local_store, base, identity)
    written = local_store.head(layout.base(identity.base_id))
    assert read_base(local_store, identity.base_id) == describe_base(identity)
    assert verify_base(local_store, identity.base_id)["uploaded"] is False
    add_base(local_store, base, identity, upload=True)
    add_base(local_store, base, identity, upload=True)
    assert local_store.head(layout.base(identity.base_id)) == written
    assert verify_base(local_store, identity.base_id)["uploaded"] is True
    stored = [info.key.rsplit("/", 1)[-1] for info in local_store.list(layout.base_files(identity.base_id))]
    assert sorted(stored) == sorted([*identity.files, "files.json"])


def test_hint_is_used_while_it_is_the_base_and_refused_when_it_is_another(
    local_store: LocalStorage, base: Path, tmp_path: Path
) -> None:
    folder, base_id = shutil.copytree(base, tmp_path / "base"), identify(base).base_id
    assert materialise(base_id, folder, local_store, tmp_path / "cache") == folder
    shutil.rmtree(folder)
    make_base(folder, seed=1)
    with pytest.raises(WrongBase, match=f"now holds other weights .* base {identify(folder).base_id}, not {base_id}"):
        materialise(base_id, folder, local_store, tmp_path / "cache")


def test_base_that_is_nowhere_names_the_way_out(local_store: LocalStorage, base: Path, tmp_path: Path) -> None:
    base_id = identify(base).base_id
    add_base(local_store, base, identify(base))
    with pytest.raises(BadInput, match="lorafleet base add --upload"):
        materialise(base_id, tmp_path / "elsewhere", local_store, tmp_path / "cache")


def test_uploaded_base_is_fetched_to_the_node_and_a_damaged_copy_is_fetched_again(
    local_store: LocalStorage, base: Path, tmp_path: Path
) -> None:
    identity = identify(base)
    add_base(local_store, base, identity, upload=True)
    fetched = materialise(identity.base_id, tmp_path / "elsewhere", local_store, tmp_path / "cache")
    assert fetched == tmp_path / "cache" / "bases" / identity.base_id
    assert {path.name for path in fetched.iterdir()} == set(identity.files)
    assert "tokenizer.json" in identity.files
    inode = fetched.stat().st_ino
    assert materialise(identity.base_id, None, local_store, tmp_path / "cache").stat().st_ino == inode
    data = bytearray((fetched / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (fetched / "model.safetensors").write_bytes(data)
    materialise(identity.base_id, None, local_store, tmp_path / "cache")
    assert identify(fetched).base_id == identity.base_id
    assert sorted(path.name for path in fetched.parent.iterdir()) == [identity.base_id, f"{identity.base_id}.lock"]


FETCH = """
import sys
from pathlib import Path
from infra.local_storage import LocalStorage
from workers.bases import materialise
materialise(sys.argv[1], None, LocalStorage(Path(sys.argv[2])), Path(sys.argv[3]))
"""


def test_processes_of_one_node_fetch_a_base_once(local_store: LocalStorage, base: Path, tmp_path: Path) -> None:
    identity = identify(base)
    add_base(local_store, base, identity, upload=True)
    arguments = [sys.executable, "-c", FETCH, identity.base_id, str(local_store.root), str(tmp_path / "cache")]
    trace = tmp_path / "trace"
    environment = os.environ | {"LORAFLEET_CRASHPOINT_TRACE": str(trace)}
    processes = [subprocess.Popen(arguments, env=environment) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert [line.split()[2] for line in trace.read_text().splitlines()] == ["base-fetched"]


def test_upload_that_was_cut_short_is_no_upload(local_store: LocalStorage, base: Path, tmp_path: Path) -> None:
    identity = identify(base)
    add_base(local_store, base, identity, upload=True)
    local_store.delete(layout.base_files(identity.base_id) + "files.json")
    assert read_listing(local_store, identity.base_id) is None
    with pytest.raises(BadInput, match="base add --upload"):
        materialise(identity.base_id, None, local_store, tmp_path)
    add_base(local_store, base, identity, upload=True)
    assert materialise(identity.base_id, None, local_store, tmp_path).is_dir()


def test_two_uploads_with_other_shards_leave_one_whole_set(local_store: LocalStorage, base: Path, tmp_path: Path) -> None:
    save(make_model("llama"), tmp_path / "sharded", max_shard_size="10KB")
    whole, sharded = identify(base), identify(tmp_path / "sharded")
    assert whole.base_id == sharded.base_id
    add_base(local_store, base, whole, upload=True)
    listing = read_listing(local_store, whole.base_id)
    add_base(local_store, tmp_path / "sharded", sharded, upload=True)
    assert read_listing(local_store, whole.base_id) == listing
    assert verify_base(local_store, whole.base_id)["uploaded"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_upload_is_found_before_any_load(
    local_store: LocalStorage, base: Path, tmp_path: Path, damage: str, name: str
) -> None:
    identity = identify(base)
    add_base(local_store, base, identity, upload=True)
    (key,) = [info.key for info in local_store.list(layout.base_files(identity.base_id)) if info.key.endswith(name)]
    data = bytearray((local_store.root / key).read_bytes())
    if damage == "delete":
        local_store.delete(key)
    elif damage == "truncate":
        (local_store.root / key).write_bytes(data[:-1])
    else:
        data[-1] ^= 1
        local_store.put(key, bytes(data))
    for attempt in (
        lambda: verify_base(local_store, identity.base_id),
        lambda: materialise(identity.base_id, None, local_store, tmp_path),
    ):
        with pytest.raises((BadInput, WorkFailed), match="is damaged|has lost"):
            attempt()
    assert not (tmp_path / "bases" / identity.base_id).exists()
