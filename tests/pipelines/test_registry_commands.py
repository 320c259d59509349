"""Adapters on the command line: listed, shown, verified, imported, measured, promoted; and the bases they belong to."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.pipelines.adapters import base_id_of, put_adapter
from tests.pipelines.command_line import CommandLine
from tests.pipelines.conftest import Trained
from tests.workers.tiny_bases import make_base

LIST_KEYS = {
    "adapter_id",
    "base_id",
    "tenant",
    "task",
    "tasks",
    "job_id",
    "metrics",
    "uri",
    "created",
    "r",
    "lora_alpha",
    "target_modules",
    "num_parameters",
}


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow is a server that is away."""
    monkeypatch.setenv("LORAFLEET_TRACKING_URI", "http://127.0.0.1:9")


def adapter_folder(store_root: Path, base_id: str, adapter_id: str, tenant: str = "acme") -> Path:
    return store_root / "tenants" / tenant / base_id / "adapters" / adapter_id


def test_trained_adapter_is_listed_in_the_words_of_the_project(used: CommandLine, trained: Trained) -> None:
    [row] = used("adapters", "list", "--json").json
    assert row.keys() == LIST_KEYS
    assert (row["adapter_id"], row["base_id"], row["job_id"]) == (trained.adapter_id, trained.base_id, trained.job_id)
    assert (row["tenant"], row["task"], row["tasks"], row["r"]) == ("acme", "menus", [], 2)
    assert row["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert row["metrics"]["eval/loss"] > 0
    assert (Path(row["uri"]) / "adapter_model.safetensors").is_file()
    table = used("adapters", "list").out
    assert trained.adapter_id in table
    assert all(len(line) > 80 for line in table.splitlines()), "cut or wrapped where there is no terminal"


def test_adapters_are_listed_by_tenant_and_by_task(cli: CommandLine, tiny_base: Path) -> None:
    base_id = base_id_of(tiny_base)
    a, b = put_adapter(cli.store, base_id, 1), put_adapter(cli.store, base_id, 2, tenant="globex", task="sales")
    for options, expected in {
        "": {a, b},
        "--tenant acme": {a},
        "--task sales": {b},
        "--task globex.sales": {b},
        "--tenant acme --task sales": set(),
    }.items():
        listed = cli("adapters", "list", *options.split(), "--json").json
        assert {row["adapter_id"] for row in listed} == expected, options
    assert cli("adapters", "list", "--tenant", "acme", "--task", "globex.sales").code == 2


def test_list_says_what_adapters_serve(cli: CommandLine, tiny_base: Path, no_server: None) -> None:
    base_id = base_id_of(tiny_base)
    a, b = put_adapter(cli.store, base_id, 1), put_adapter(cli.store, base_id, 2)
    for adapter_id in (a, b):
        assert cli("promote", adapter_id[:8], "--json").code == 0
    rows = {row["adapter_id"]: row["tasks"] for row in cli("adapters", "list", "--json").json}
    assert rows == {
        a: [{"task": "support", "model": "acme.support", "aliases": ["previous"]}],
        b: [{"task": "support", "model": "acme.support", "aliases": ["champion"]}],
    }
    assert "support@champion" in cli("adapters", "list").out
    shown = cli("adapters", "show", "acme.support@champion", "--json").json
    assert shown["adapter_id"] == b
    assert [key.split("/")[2:4] for key in shown["evidence"]] == [["evidence", b]]
    assert f"acme.support  {'champion'}" in cli("adapters", "show", b).out


def test_damaged_manifest_hides_no_other_adapter_but_is_told(cli: CommandLine, tiny_base: Path) -> None:
    base_id = base_id_of(tiny_base)
    a, b = put_adapter(cli.store, base_id, 1), put_adapter(cli.store, base_id, 2)
    (cli.store.root / "tenants" / "acme" / base_id / "manifests" / f"{a}.json").write_text("{")
    ended = cli("adapters", "list", "--json")
    assert ended.code == 1
    assert [row["adapter_id"] for row in ended.json] == [b]
    assert f"{a}.json" in ended.err


def test_verification_names_the_damaged_adapter_and_its_file(cli: CommandLine, tiny_base: Path) -> None:
    base_id = base_id_of(tiny_base)
    a, b, c = (put_adapter(cli.store, base_id, seed) for seed in (1, 2, 3))
    assert f"no record of the base {base_id}" in cli("adapters", "verify", a).out
    cli("base", "add", tiny_base)
    assert cli("adapters", "verify", "--all").code == 0
    weights = adapter_folder(cli.store.root, base_id, a) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    (adapter_folder(cli.store.root, base_id, b) / "adapter_config.json").unlink()
    ended = cli("adapters", "verify", "--all", "--json")
    assert ended.code == 1
    found = {row["adapter_id"]: row for row in ended.json}
    assert {adapter_id: row["ok"] for adapter_id, row in found.items()} == {a: False, b: False, c: True}
    assert "adapter_model.safetensors" in found[a]["problem"]
    assert "adapter_config.json" in found[b]["problem"]
    assert cli("adapters", "verify", c).code == 0
    one = cli("adapters", "verify", c, a)
    assert one.code == 1
    assert "2 adapters read, 1 of them damaged" in one.out


def test_imported_adapter_is_the_same_however_often_it_is_imported(cli: CommandLine, used_folder: Path, trained: Trained) -> None:
    command = ["adapters", "import", used_folder, "--base", trained.base, "--tenant", "globex", "--task", "menus", "--json"]
    first, again = cli(*command).json, cli(*command).json
    assert (first["adapter_id"], first["base_id"], first["imported"]) == (trained.adapter_id, trained.base_id, True)
    assert again == first | {"imported": False}
    [row] = cli("adapters", "list", "--json").json
    assert (row["tenant"], row["task"], row["job_id"]) == ("globex", "menus", None)
    assert cli("adapters", "verify", "--all").code == 0
    assert "none: imported" in cli("adapters", "show", trained.adapter_id[:8]).out


@pytest.fixture
def used_folder(trained: Trained, tmp_path: Path) -> Path:
    """The trained adapter as a PEFT folder outside of any store."""
    store = trained.folder / ".lorafleet" / "store"
    return shutil.copytree(adapter_folder(store, trained.base_id, trained.adapter_id), tmp_path / "made-elsewhere")


def test_import_on_a_base_that_does_not_fit_is_refused(
    cli: CommandLine, used_folder: Path, test_data: Path, trained: Trained
) -> None:
    shallow = shutil.copytree(trained.base, cli.folder / "shallow")
    config = json.loads((shallow / "config.json").read_text())
    (shallow / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    for base, said in (
        (test_data / "bases" / "talk-5m", "map 64 to 32 features, this base maps 256 to 128"),
        (shallow, "layers.1"),
    ):
        ended = cli("adapters", "import", used_folder, "--base", base, "--tenant", "acme")
        assert ended.code == 2
        assert said in ended.sentence
        assert cli.listing() == {}


def test_import_of_a_damaged_folder_is_refused(cli: CommandLine, used_folder: Path, trained: Trained) -> None:
    weights = used_folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    whole = weights.read_bytes()
    first = next(iter(tensors))
    broken = {first: tensors[first] * float("nan")} | {name: tensors[name] for name in tensors if name != first}
    idle = {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in tensors.items()}
    for content, said in ((broken, "NaN"), (idle, "every lora_B of the adapter is zero")):
        save_file(content, weights)
        ended = cli("adapters", "import", used_folder, "--base", trained.base, "--tenant", "acme")
        assert (ended.code, said in ended.sentence) == (2, True), ended.err
    weights.write_bytes(whole[: len(whole) // 2])
    ended = cli("adapters", "import", used_folder, "--base", trained.base, "--tenant", "acme")
    assert (ended.code, "truncated or damaged" in ended.sentence) == (2, True)
    assert cli.listing() == {}


def test_evaluation_repeats_what_training_measured(used: CommandLine, trained: Trained) -> None:
    result = used("evaluate", trained.adapter_id, "--json").json
    [manifest] = used("adapters", "list", "--json").json
    plain, adapted = result["measured"]
    assert (result["tenant"], result["base_id"], result["data"], result["num_rows"]) == ("acme", trained.base_id, "validation", 4)
    assert (plain["adapter_id"], adapted["adapter_id"]) == (None, trained.adapter_id)
    assert adapted["metrics"].keys() == manifest["metrics"].keys()
    assert adapted["metrics"]["eval/loss"] == pytest.approx(manifest["metrics"]["eval/loss"], rel=1e-5)
    assert adapted["metrics"]["eval/loss"] < plain["metrics"]["eval/loss"]


def test_imported_adapter_is_evaluated_and_answers(cli: CommandLine, used_folder: Path, trained: Trained) -> None:
    imported = cli("adapters", "import", used_folder, "--base", trained.base, "--tenant", "globex", "--json").json
    rows = trained.folder / "valid.jsonl"
    result = cli("evaluate", imported["adapter_id"], "--data", rows, "--generate", "1", "--json").json
    assert result["num_rows"] == 4
    assert "eval/exact_match" in result["measured"][1]["metrics"]
    text = cli("evaluate", imported["adapter_id"], "--data", rows).out
    assert "plain base" in text
    assert imported["adapter_id"] in text
    assert cli("evaluate", imported["adapter_id"]).sentence.endswith("name some with --data.")
    answers = cli("generate", imported["adapter_id"], "--data", rows, "--rows", "2", "--max-new-tokens", "3", "--json").json
    assert [answer.keys() for answer in answers] == [{"where", "generated", "reference"}] * 2


def test_prompt_is_answered_alone(used: CommandLine, trained: Trained) -> None:
    ended = used(
        "generate", trained.adapter_id, "--prompt", "name[The Eagle], area[riverside]", "--max-new-tokens", "4", "--json"
    )
    [answer] = ended.json
    assert answer["generated"]
    assert answer["reference"] is None
    plain = used("generate", trained.adapter_id, "--prompt", "name[The Eagle], area[riverside]", "--max-new-tokens", "4")
    assert plain.out.strip() == answer["generated"]
    assert "expected" in used("generate", trained.adapter_id, "--rows", "1", "--max-new-tokens", "2").out


def test_adapters_of_two_tenants_meet_on_named_rows_only(cli: CommandLine, used_folder: Path, trained: Trained) -> None:
    for tenant in ("acme", "globex"):
        cli("adapters", "import", used_folder, "--base", trained.base, "--tenant", tenant, "--task", "menus")
        assert cli("promote", trained.adapter_id, "--tenant", tenant).code == 0
    both = ["evaluate", "acme.menus@champion", "globex.menus@champion"]
    assert "different tenants (acme, globex)" in cli(*both).sentence
    assert len(cli(*both, "--data", trained.folder / "valid.jsonl", "--json").json["measured"]) == 3


def test_base_with_another_tokenizer_is_refused(used: CommandLine, trained: Trained, tmp_path: Path) -> None:
    copy = shutil.copytree(trained.base, tmp_path / "copy")
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["normalizer"] = None
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    ended = used("evaluate", trained.adapter_id, "--base", copy)
    assert ended.code == 2
    assert "with another tokenizer or chat template" in ended.sentence


def test_promotion_and_rollback_need_no_mlflow(cli: CommandLine, tiny_base: Path, no_server: None) -> None:
    base_id = base_id_of(tiny_base)
    a, b = put_adapter(cli.store, base_id, 1), put_adapter(cli.store, base_id, 2)
    first = cli("promote", a[:8], "--base", tiny_base, "--reason", "first")
    assert first.code == 0
    assert f"{a[:12]} is champion of acme.support" in first.out
    assert "note: " in first.err
    assert "MLflow will follow with 'lorafleet reconcile'" in first.err
    assert cli("promote", b).code == 0
    back = cli("rollback", "acme.support", "--reason", "worse", "--json").json
    assert (back["kind"], back["adapter_id"], back["changed"], back["reason"]) == ("rollback", a, True, "worse")
    entries = cli("history", "acme.support", "--json").json
    assert [(one["generation"], one["kind"], one["adapter_id"]) for one in entries] == [
        (1, "promote", a),
        (2, "promote", b),
        (3, "rollback", a),
    ]
    assert [row.split()[0] for row in cli("history", "acme.support").out.splitlines()] == ["generation", "1", "2", "3"]
    assert "Did you mean 'acme.support'?" in cli("history", "acme.suport").sentence
    assert cli("rollback", "acme.support", "--to", b[:8]).code == 0


def test_reconcile_is_exit_code_1_until_what_differs_is_fixed(cli: CommandLine, tiny_base: Path) -> None:
    adapter_id = put_adapter(cli.store, base_id_of(tiny_base), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAFLEET_TRACKING_URI", "http://127.0.0.1:9")
        assert cli("promote", adapter_id).code == 0
        assert cli("reconcile").code == 4
    found = cli("reconcile", "--json")
    assert found.code == 1
    assert {(one["subject"], one["fixed"]) for one in found.json} == {("acme.support", False)}
    fixed = cli("reconcile", "--fix")
    assert fixed.code == 0
    assert "fixed" in fixed.out
    assert cli("reconcile").out == "MLflow shows what the store says.\n"


def test_base_is_added_shown_and_verified_by_id_and_folder(cli: CommandLine, tiny_base: Path) -> None:
    base_id = base_id_of(tiny_base)
    shown = cli("base", "show", tiny_base, "--json").json
    assert (shown["base_id"], shown["known"], shown["uploaded"]) == (base_id, False, False)
    assert not cli.home.exists()
    assert cli("base", "add", tiny_base).code == 0
    assert cli("base", "add", tiny_base, "--upload", "--json").json["uploaded"] is True
    put_adapter(cli.store, base_id, 1)
    by_id = cli("base", "show", base_id[:6], "--json").json
    assert (by_id["known"], by_id["uploaded"], by_id["adapters"]) == (True, True, {"acme": 1})
    assert "model.safetensors" in by_id["files"]
    [row] = cli("base", "list", "--json").json
    assert (row["base_id"], row["num_adapters"]) == (base_id, 1)
    assert cli("base", "verify", base_id).code == 0
    assert cli("base", "verify", tiny_base).code == 0


def test_damaged_upload_of_a_base_is_found(cli: CommandLine, tiny_base: Path) -> None:
    base_id = cli("base", "add", tiny_base, "--upload", "--json").json["base_id"]
    [weights] = cli.store.root.glob(f"bases/{base_id}/files/*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    ended = cli("base", "verify", base_id, "--json")
    assert ended.code == 1
    assert ended.json["ok"] is False
    assert "model.safetensors" in ended.json["problem"]


def test_base_without_weights_or_with_pickles_is_refused(cli: CommandLine, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    for command in (["base", "add", base], ["base", "show", base], ["base", "verify", base]):
        ended = cli(*command)
        assert ended.code == 2
        assert "pickle" in ended.sentence
    assert cli.listing() == {}
