"""Adapters in the store exist whole or not at all, and never meet a base or a file that is not theirs."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infra.errors import BadInput, WrongBase
from infra.local_storage import LocalStorage
from infra.records import decode_record
from tests.workers.tiny_adapters import BASE, BODY, OTHER_BASE, random_adapter, train_with_peft, write_files
from tests.workers.tiny_bases import copy_with_config, make_base
from workers import layout
from workers.adapter import adapter_id
from workers.adapter_files import CONFIG_NAME, WEIGHTS_NAME, adapter_files, parse_adapter, read_adapter_folder
from workers.adapter_store import load_adapter, store_adapter
from workers.identity import describe_base, identify
from workers.manifests import AdapterRef, check_base, find_adapter, list_adapters, read_manifest


def test_stored_adapter_is_read_back_bit_for_bit(local_store: LocalStorage, tmp_path: Path) -> None:
    train_with_peft(tmp_path / "theirs", "gpt2")
    adapter = read_adapter_folder(tmp_path / "theirs")
    own_id = store_adapter(local_store, "acme", BASE, adapter, BODY)
    found = load_adapter(local_store, "acme", None, own_id[:6])
    assert found.adapter_id == own_id == adapter_id(BASE, adapter)
    assert found.adapter.config == adapter.config
    assert all(torch.equal(found.adapter.tensors[name], tensor) for name, tensor in adapter.tensors.items())
    stored = [info.key for info in local_store.list(layout.adapter("acme", BASE, own_id))]
    assert [key.rsplit("/", 1)[-1] for key in stored] == [CONFIG_NAME, WEIGHTS_NAME]
    assert found.manifest["job_id"] == BODY["job_id"]
    assert found.manifest["peft"]["r"] == 4


def test_second_job_with_the_same_adapter_keeps_manifest_and_files_of_the_first(local_store: LocalStorage) -> None:
    own_id = store_adapter(local_store, "acme", BASE, random_adapter(), BODY)
    before = {info.key: info.etag for info in local_store.list("")}
    second = random_adapter(dropout=0.5, name="elsewhere")
    assert store_adapter(local_store, "acme", BASE, second, BODY | {"job_id": "k" * 32}) == own_id
    assert {info.key: info.etag for info in local_store.list("")} == before


def test_rival_that_stored_other_files_for_the_same_adapter_leaves_a_whole_one(local_store: LocalStorage) -> None:
    rival, ours = random_adapter(dropout=0.5), random_adapter()
    own_id = adapter_id(BASE, ours)
    local_store.put(layout.adapter("acme", BASE, own_id) + CONFIG_NAME, adapter_files(rival)[CONFIG_NAME])
    store_adapter(local_store, "acme", BASE, ours, BODY)
    assert load_adapter(local_store, "acme", BASE, own_id).adapter.config["lora_dropout"] == 0.5


def test_damaged_leftovers_of_a_killed_writer_are_replaced(local_store: LocalStorage) -> None:
    own_id = adapter_id(BASE, random_adapter())
    local_store.put(layout.adapter("acme", BASE, own_id) + WEIGHTS_NAME, b"torn")
    store_adapter(local_store, "acme", BASE, random_adapter(), BODY)
    assert load_adapter(local_store, "acme", BASE, own_id).adapter_id == own_id


STORE = """
import sys
from pathlib import Path
from infra.local_storage import LocalStorage
from workers.adapter_files import read_adapter_folder
from workers.adapter_store import store_adapter
store_adapter(LocalStorage(Path(sys.argv[1])), "acme", "b" * 32, read_adapter_folder(Path(sys.argv[2])), {"created": 0.0})
"""


def test_writer_killed_between_files_and_manifest_leaves_no_adapter_and_finishes_when_repeated(
    local_store: LocalStorage, tmp_path: Path
) -> None:
    folder = write_files(tmp_path / "adapter", random_adapter())
    command = [sys.executable, "-c", STORE, str(local_store.root), str(folder)]
    killed = subprocess.run(command, env=os.environ | {"LORAFLEET_CRASHPOINT": "adapter-files-written"}, check=False)
    assert killed.returncode == -9
    assert list(local_store.list(""))
    assert list_adapters(local_store, "acme") == []
    own_id = store_adapter(local_store, "acme", BASE, random_adapter(), BODY)
    assert [manifest["adapter_id"] for manifest in list_adapters(local_store)] == [own_id]
    assert load_adapter(local_store, "acme", BASE, own_id).adapter_id == own_id


def _flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("through_the_store", [True, False])
@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
@pytest.mark.parametrize("damage", [_flip, lambda data: data[:-3], lambda data: b""])
def test_damaged_objects_are_found_before_anything_is_loaded(
    local_store: LocalStorage, name: str, damage: Callable[[bytes], bytes], through_the_store: bool
) -> None:
    own_id = store_adapter(local_store, "acme", BASE, random_adapter(), BODY)
    key = layout.adapter("acme", BASE, own_id) + name
    data = damage((local_store.root / key).read_bytes())
    if through_the_store:
        local_store.put(key, data)
    else:
        (local_store.root / key).write_bytes(data)
    with pytest.raises(BadInput, match=f"{name}.* is damaged"):
        load_adapter(local_store, "acme", BASE, own_id)


def test_lost_files_and_swapped_manifests_are_named(local_store: LocalStorage) -> None:
    first, second = (store_adapter(local_store, "acme", BASE, random_adapter(seed), BODY) for seed in (0, 1))
    local_store.delete(layout.adapter("acme", BASE, first) + WEIGHTS_NAME)
    with pytest.raises(BadInput, match="has lost .*adapter_model.safetensors"):
        load_adapter(local_store, "acme", BASE, first)
    manifest, _ = local_store.get(layout.manifest("acme", BASE, second))
    local_store.put(layout.manifest("acme", BASE, first), manifest)
    with pytest.raises(BadInput, match="manifest of another adapter"):
        read_manifest(local_store, AdapterRef("acme", BASE, first))


def test_adapters_are_found_by_prefix_within_a_tenant_or_over_all(local_store: LocalStorage) -> None:
    acme = store_adapter(local_store, "acme", BASE, random_adapter(), BODY)
    other = store_adapter(local_store, "acme", OTHER_BASE, random_adapter(), BODY)
    store_adapter(local_store, "globex", BASE, random_adapter(), BODY)
    assert find_adapter(local_store, "acme", acme[:4]) == AdapterRef("acme", BASE, acme)
    assert find_adapter(local_store, None, other) == AdapterRef("acme", OTHER_BASE, other)
    with pytest.raises(
        BadInput, match=rf"fits 2 adapters: {acme} \(acme\), {acme} \(globex\); give more characters, or the tenant"
    ):
        find_adapter(local_store, None, acme)
    with pytest.raises(BadInput, match="no adapter of tenant 'globex' starts with"):
        find_adapter(local_store, "globex", other[:8])
    for wrong in ("abc", "ABCDEF", "../../x", "acme.support@champion", ""):
        with pytest.raises(BadInput, match="names no adapter; give an id"):
            find_adapter(local_store, "acme", wrong)
    assert [manifest["tenant"] for manifest in list_adapters(local_store)] == ["acme", "acme", "globex"]
    assert [manifest["base_id"] for manifest in list_adapters(local_store, "acme")] == [BASE, OTHER_BASE]


def test_listing_and_checking_adapters_loads_no_torch() -> None:
    run = "import sys, workers.manifests; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", run], check=True)


def test_wrong_base_is_refused_and_what_differs_is_named(local_store: LocalStorage, tmp_path: Path) -> None:
    own = identify(make_base(tmp_path / "own"))
    others = {
        "weights": identify(make_base(tmp_path / "other", seed=1)),
        "rms_norm_eps: 1e-06 -> 0.001": identify(
            copy_with_config(tmp_path / "own", tmp_path / "edited", lambda raw: raw.update(rms_norm_eps=1e-3))
        ),
    }
    store_adapter(local_store, "acme", own.base_id, random_adapter(), BODY | {"created": time.time()})
    (manifest,) = list_adapters(local_store)
    check_base(manifest, own, prompt_contract=BODY["prompt_contract"])
    for named, other in others.items():
        with pytest.raises(WrongBase, match=rf"{own.base_id}, not on {other.base_id} \(what differs: {named}\); use the base"):
            check_base(manifest, other, trained_on=describe_base(own))
        with pytest.raises(WrongBase, match=f"{own.base_id}, not on {other.base_id}; use the base"):
            check_base(manifest, other.base_id)
    with pytest.raises(WrongBase, match="another tokenizer or chat template"):
        check_base(manifest, own, prompt_contract="q" * 32)


def test_manifest_names_every_file_with_digest_and_size(local_store: LocalStorage) -> None:
    own_id = store_adapter(local_store, "acme", BASE, random_adapter(), BODY)
    key = layout.manifest("acme", BASE, own_id)
    body = decode_record(local_store.get(key)[0], "manifest/1", key)
    for name, known in body["files"].items():
        data, info = local_store.get(layout.adapter("acme", BASE, own_id) + name)
        assert known == {"sha256": info.sha256, "size_bytes": len(data)}
    assert sorted(body["files"]) == [CONFIG_NAME, WEIGHTS_NAME]
    assert parse_adapter({name: local_store.get(layout.adapter("acme", BASE, own_id) + name)[0] for name in body["files"]}, "x")
