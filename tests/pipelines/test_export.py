"""`lorafleet adapters export` on the command line: folders and S3, once and never changed, one sentence for what cannot be."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from infra.local_storage import LocalStorage
from infra.stores import open_store
from pipelines.journal import Change, commit
from tests.pipelines.command_line import CommandLine
from tests.pipelines.conftest import Trained
from tests.workers.tiny_adapters import train_with_peft
from tests.workers.tiny_bases import logits, make_base, make_model, write_tokenizer
from workers.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from workers.identity import identify


@pytest.fixture(scope="session")
def spoken_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer."""
    folder = make_base(tmp_path_factory.mktemp("bases") / "spoken")
    write_tokenizer(folder, "llama")
    return folder


@pytest.fixture
def imported(cli: CommandLine, spoken_base: Path, tmp_path: Path) -> str:
    """The id of an rsLoRA adapter of acme.support, which some engines read wrong."""
    train_with_peft(tmp_path / "theirs", use_rslora=True, lora_alpha=7)
    command = (
        "adapters",
        "import",
        tmp_path / "theirs",
        "--base",
        spoken_base,
        "--tenant",
        "acme",
        "--task",
        "support",
        "--json",
    )
    return str(cli(*command).json["adapter_id"])


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_export_is_a_folder_of_its_own_with_its_proof_and_a_manifest(cli: CommandLine, imported: str, tmp_path: Path) -> None:
    result = cli("adapters", "export", imported[:8], "--for", "sglang", "--to", "out", "--json").json
    folder = tmp_path / "out" / f"acme--support--g{imported[:12]}"
    assert (result["name"], result["uri"]) == (folder.name, str(folder))
    assert (result["form"], result["created"], result["r"], result["lora_alpha"]) == ("universal", True, 4, 4)
    assert set(files_in(folder)) == {CONFIG_NAME, WEIGHTS_NAME, "proof.json", "export.json"}
    by_age = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert [path.name for path in by_age] == [WEIGHTS_NAME, "proof.json", CONFIG_NAME, "export.json"], "whole when it is seen"
    proof = json.loads((folder / "proof.json").read_text())
    assert proof["float64"]["largest_difference"] < 1e-6 < proof["if_read_as_stored"]
    assert {one["consumer"]: one["form"] for one in result["compatibility"]}["vllm"] == "plain"
    with torch.no_grad():
        served = logits(PeftModel.from_pretrained(make_model("llama"), folder).eval())
        trained = logits(PeftModel.from_pretrained(make_model("llama"), tmp_path / "theirs").eval())
    assert torch.allclose(served, trained, atol=1e-5)


def test_export_for_peft_loads_unchanged(cli: CommandLine, imported: str, tmp_path: Path) -> None:
    name = cli("adapters", "export", imported, "--for", "peft", "--to", "out", "--json").json["name"]
    [stored] = cli.store.root.glob(f"tenants/acme/*/adapters/{imported}")
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "out" / name / file).read_bytes() == (stored / file).read_bytes()
    served = logits(PeftModel.from_pretrained(make_model("llama"), tmp_path / "out" / name).eval())
    assert torch.equal(served, logits(PeftModel.from_pretrained(make_model("llama"), tmp_path / "theirs").eval()))


def test_exporting_again_changes_nothing_and_other_content_is_refused(cli: CommandLine, imported: str, tmp_path: Path) -> None:
    command = ("adapters", "export", imported, "--for", "vllm", "--to", "out")
    first = cli(*command, "--base-string", "org/model", "--json").json
    folder = Path(first["uri"])
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    again = cli(*command, "--base-string", "org/model", "--json").json
    assert again == first | {"created": False}
    other = cli(*command, "--base-string", "org/other")
    assert other.code == 2
    assert "holds another export (base_string 'org/model', now 'org/other')" in other.sentence
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before
    assert json.loads((folder / CONFIG_NAME).read_text())["base_model_name_or_path"] == "org/model"


def test_export_that_was_killed_is_finished_and_what_is_not_ours_is_left_alone(cli: CommandLine, imported: str) -> None:
    command = ("adapters", "export", imported, "--for", "sglang", "--to", "out", "--json")
    first = cli(*command).json
    folder = Path(first["uri"])
    (folder / "export.json").unlink()
    (folder / CONFIG_NAME).unlink()
    assert cli(*command).json == first
    (folder / "export.json").unlink()
    shutil.copyfile(folder / "proof.json", folder / WEIGHTS_NAME)
    shutil.rmtree(folder.parent / ".~lorafleet")  # or the store itself would notice
    ended = cli(*command)
    assert ended.code == 2
    assert f"{WEIGHTS_NAME} holds other content" in ended.sentence
    assert (folder / WEIGHTS_NAME).read_bytes() == (folder / "proof.json").read_bytes()


def test_champions_bear_their_generation_which_is_no_beginning_of_another(cli: CommandLine, imported: str) -> None:
    [manifest] = cli.store.root.glob("tenants/acme/*/manifests/*.json")
    base_id = manifest.parent.parent.name
    for generation in range(11):
        change = Change(kind="promote", adapter_id=imported, base_id=base_id, actor="test", previous=None)
        commit(cli.store, "acme", "support", change, generation)
        if generation in (0, 10):
            cli("adapters", "export", "acme.support@champion", "--for", "peft", "--to", "out")
    names = sorted(path.name for path in Path("out").iterdir() if not path.name.startswith("."))
    assert names == ["acme--support--g000001", "acme--support--g000011"]


def test_s3_gets_the_same_folder_and_nothing_twice(cli: CommandLine, imported: str, s3_bucket: str) -> None:
    command = ("adapters", "export", imported, "--for", "ray-llm", "--to", f"{s3_bucket}/loras", "--json")
    first = cli(*command).json
    assert first["uri"] == f"{s3_bucket}/loras/{first['name']}"
    store = open_store(f"{s3_bucket}/loras")
    written = {info.key: info for info in store.list("")}
    assert set(written) == {f"{first['name']}/{file}" for file in (CONFIG_NAME, WEIGHTS_NAME, "proof.json", "export.json")}
    assert cli(*command).json == first | {"created": False}
    assert {info.key: info for info in store.list("")} == written


def test_merged_export_loads_as_a_plain_model(cli: CommandLine, imported: str, spoken_base: Path, tmp_path: Path) -> None:
    result = cli("adapters", "export", imported, "--for", "merged", "--to", "out", "--json").json
    folder = Path(result["uri"])
    assert result["merged_base_id"] == identify(folder).base_id != result["base_id"]
    assert (folder / "tokenizer.json").read_bytes() == (spoken_base / "tokenizer.json").read_bytes()
    merged = make_model("llama")
    merged.load_state_dict(load_file(folder / "model.safetensors"))
    expected = logits(PeftModel.from_pretrained(make_model("llama"), tmp_path / "theirs").eval())
    assert torch.allclose(logits(merged), expected, atol=1e-5)
    assert cli("adapters", "export", imported, "--for", "merged", "--to", "out", "--json").json == result | {"created": False}
    assert "a base of their own" in cli("adapters", "export", imported, "--for", "merged", "--to", "elsewhere").out


BAD: list[tuple[list[str], str]] = [
    (["--for", "vllm"], "give --base-string the server's --model"),
    (["--for", "vllm", "--base-string", " "], "--base-string is empty"),
    (["--for", "merged", "--base-string", "x"], "names no base; leave it out"),
    (["--for", "vlm"], "did you mean 'vllm'?"),
    (["--for", "sglang", "--max-rank", "2"], "its rank is 4 and the server takes 2 at most"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input_is_one_sentence_and_writes_nothing(
    cli: CommandLine, imported: str, options: list[str], sentence: str, tmp_path: Path
) -> None:
    ended = cli("adapters", "export", imported, "--to", "out", *options)
    assert ended.code == 2
    assert sentence in ended.sentence
    assert not (tmp_path / "out").exists()


def test_target_that_cannot_be_written_is_one_sentence(cli: CommandLine, imported: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = cli("adapters", "export", imported, "--for", "peft", "--to", "file")
    assert ended.code == 2
    assert "is a file; name a folder" in ended.sentence
    below = cli("adapters", "export", imported, "--for", "peft", "--to", "/proc/lorafleet")
    assert below.code == 4
    assert "/proc/lorafleet" in below.sentence
    lost = cli("adapters", "export", imported, "--for", "peft", "--to", "ftp://host/x")
    assert "of no known kind" in lost.sentence


def test_another_base_is_refused(cli: CommandLine, imported: str, other_base: Path) -> None:
    ended = cli("adapters", "export", imported, "--for", "peft", "--to", "out", "--base", other_base)
    assert ended.code == 2
    assert "was trained on the base" in ended.sentence
    assert "weights" in ended.sentence


def test_adapter_trained_here_is_exported_for_every_consumer(used: CommandLine, trained: Trained, tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    for consumer in ("peft", "vllm", "merged"):
        options = ("--base-string", "stories") if consumer == "vllm" else ()
        command = ("adapters", "export", trained.adapter_id, "--for", consumer, "--to", tmp_path / consumer, *options, "--json")
        found[consumer] = used(*command).json
    for result in found.values():
        assert result["proof"]["float64"]["share_of_largest_logit"] < 1e-6
        assert result["name"].startswith("acme--menus--g")
    assert LocalStorage(tmp_path / "vllm").head(f"{found['vllm']['name']}/export.json") is not None
