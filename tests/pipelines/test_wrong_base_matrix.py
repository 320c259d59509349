"""An adapter and every kind of other base, at every place where the two could meet: the right answer in each cell.

Rows: a base that differs from the adapter's in one respect. Columns: what a person asks for. A cell is the exit code and what the
one sentence says, or 0 where the adapter may rightly meet that base.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.pipelines.command_line import CommandLine, installation
from tests.pipelines.conftest import JOB, Trained
from workers.identity import identify

LAYER = "model.layers.{}."


def edit(base: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file of a base in place."""
    content = json.loads((base / name).read_text())
    change(content)
    (base / name).write_text(json.dumps(content))


def edit_weights(base: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the weights of a base in place."""
    save_file(change(load_file(base / "model.safetensors")), base / "model.safetensors", metadata={"format": "pt"})


def num_layers(base: Path) -> int:
    return int(json.loads((base / "config.json").read_text())["num_hidden_layers"])


def other_weights(base: Path) -> None:
    """The same shapes, one number a little larger."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.norm.weight"][0] += 1e-3
        return tensors

    edit_weights(base, change)


def deeper(base: Path) -> None:
    """One layer more, a copy of the last."""
    count = num_layers(base)
    last, new = LAYER.format(count - 1), LAYER.format(count)
    edit_weights(base, lambda old: old | {k.replace(last, new): v.clone() for k, v in old.items() if k.startswith(last)})
    edit(base, "config.json", lambda config: config.update(num_hidden_layers=count + 1))


def shallower(base: Path) -> None:
    """One layer less."""
    count = num_layers(base)
    edit_weights(base, lambda old: {k: v for k, v in old.items() if not k.startswith(LAYER.format(count - 1))})
    edit(base, "config.json", lambda config: config.update(num_hidden_layers=count - 1))


def other_vocabulary(base: Path) -> None:
    """Eight tokens more."""
    name = "model.embed_tokens.weight"
    edit_weights(base, lambda old: old | {name: torch.cat([old[name], torch.zeros(8, old[name].shape[1])])})
    edit(base, "config.json", lambda config: config.update(vocab_size=config["vocab_size"] + 8))


def other_tokenizer(base: Path) -> None:
    """The same weights, and text cut into tokens otherwise."""
    edit(base, "tokenizer.json", lambda tokenizer: tokenizer.update(normalizer=None))


def other_template(base: Path) -> None:
    """The same weights and tokens, and a chat template of its own."""
    (base / "chat_template.jinja").write_text("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}")


def quantised(base: Path) -> None:
    """Declared as quantised before."""
    view = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    edit(base, "config.json", lambda config: config.update(quantization_config=view))


BASES = {
    "other weights": other_weights,
    "deeper": deeper,
    "shallower": shallower,
    "other vocabulary": other_vocabulary,
    "other tokenizer": other_tokenizer,
    "other template": other_template,
    "quantised": quantised,
}
NAMES = {
    "other weights": "what differs: weights",
    "deeper": "num_hidden_layers: 5 -> 6",
    "shallower": "num_hidden_layers: 5 -> 4",
    "other vocabulary": "vocab_size: 512 -> 520",
    "other tokenizer": "tokenizer",
    "other template": "template",
    "quantised": "quantization_config",
}
"""What the refusal names, by base."""


@pytest.fixture(scope="module")
def bases(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("others")
    made = {}
    for name, change in BASES.items():
        made[name] = shutil.copytree(trained.base, folder / name.replace(" ", "-"))
        change(made[name])
    return made


@pytest.fixture
def copied(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[CommandLine]:
    """The command line on a copy of the home in which the adapter was trained, its MLflow too: making one takes seconds."""
    shutil.copytree(trained.folder / ".lorafleet", tmp_path / ".lorafleet")
    with installation(tmp_path):
        yield CommandLine(tmp_path, capsys)


def commands(trained: Trained, base: Path) -> dict[str, list[str | Path]]:
    adapter = trained.adapter_id
    return {
        "evaluate": ["evaluate", adapter, "--base", base],
        "generate": ["generate", adapter, "--base", base, "--prompt", "name[The Eagle]", "--max-new-tokens", "2"],
        "promote": ["promote", adapter, "--base", base],
    }


@pytest.mark.parametrize("action", ["evaluate", "generate", "promote"])
@pytest.mark.parametrize("name", BASES)
def test_other_base_is_refused_and_named(
    copied: CommandLine, trained: Trained, bases: dict[str, Path], name: str, action: str
) -> None:
    before = copied.listing()
    ended = copied(*commands(trained, bases[name])[action])
    assert ended.code == 2
    assert NAMES[name] in ended.sentence
    assert copied.listing() == before, "nothing was written"


@pytest.mark.parametrize("action", ["evaluate", "generate", "promote"])
def test_own_base_at_another_place_is_taken(copied: CommandLine, trained: Trained, tmp_path: Path, action: str) -> None:
    copy = shutil.copytree(trained.base, tmp_path / "moved")
    assert copied(*commands(trained, copy)[action]).code == 0


def job_file(folder: Path, trained: Trained, base: Path, quantization: str = "") -> Path:
    """Write a job that continues the trained adapter on `base`."""
    text = JOB.format(base=base, data=trained.folder)
    text = text.replace("target_modules: attention}", f"target_modules: attention, init_adapter: {trained.adapter_id}}}")
    (folder / "job.yaml").write_text(text.replace(f"{base}}}", f"{base}{quantization}}}"))
    return folder / "job.yaml"


@pytest.mark.parametrize("name", BASES)
def test_training_does_not_go_on_from_an_adapter_of_another_base(
    copied: CommandLine, trained: Trained, bases: dict[str, Path], name: str
) -> None:
    jobs = {key for key in copied.listing() if "/jobs/" in key}
    ended = copied("train", job_file(copied.folder, trained, bases[name]))
    assert ended.code == 2
    assert {"quantised": "quantised before"}.get(name, NAMES[name]) in ended.sentence
    assert {key for key in copied.listing() if "/jobs/" in key} == jobs


def test_training_goes_on_in_another_view_of_the_same_base(copied: CommandLine, trained: Trained) -> None:
    """How weights are held while training is part of the job's id and of merging, and no other base."""
    view = ", quantization: {load_in_4bit: true, bnb_4bit_quant_type: nf4}"
    ended = copied("train", job_file(copied.folder, trained, trained.base, view), "--json")
    assert ended.code == 0, ended.err
    assert ended.json["base_id"] == trained.base_id
    assert ended.json["job_id"] != trained.job_id


IMPORTS = {
    "other weights": None,
    "deeper": "fewer layers",
    "shallower": "layers.4",
    "other vocabulary": None,
    "other tokenizer": None,
    "other template": None,
    "quantised": None,
}
"""What the refusal of an import says. None: the files fit, and whose they are is what the person says; locked to that base."""


@pytest.mark.parametrize("name", BASES)
def test_import_takes_what_fits_and_locks_it_to_the_base_it_was_given(
    cli: CommandLine, trained: Trained, bases: dict[str, Path], name: str
) -> None:
    store = trained.folder / ".lorafleet" / "store" / "tenants" / "acme" / trained.base_id
    folder = store / "adapters" / trained.adapter_id
    ended = cli("adapters", "import", folder, "--base", bases[name], "--tenant", "globex", "--task", "menus", "--json")
    refusal = IMPORTS[name]
    if refusal is not None:
        assert (ended.code, refusal in ended.sentence) == (2, True), ended.err
        assert cli.listing() == {}
        return
    assert ended.code == 0
    assert ended.json["base_id"] == identify(bases[name]).base_id
    meets = cli("generate", ended.json["adapter_id"], "--base", trained.base, "--prompt", "a", "--max-new-tokens", "1")
    assert meets.code == 2, "who imports it for another base says that it is that base's"
    assert ("tokenizer" if name in ("other tokenizer", "other template") else "what differs") in meets.sentence


def test_task_that_serves_a_base_refuses_an_adapter_of_another(
    copied: CommandLine, trained: Trained, bases: dict[str, Path]
) -> None:
    store = copied.store.root / "tenants" / "acme" / trained.base_id / "adapters" / trained.adapter_id
    assert copied("promote", trained.adapter_id).code == 0
    other = copied("adapters", "import", store, "--base", bases["other weights"], "--tenant", "acme", "--task", "menus", "--json")
    ended = copied("promote", other.json["adapter_id"])
    assert ended.code == 2
    assert "--change-base" in ended.sentence


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["adapters", "show", "../../x"], "names no adapter"),
        (["adapters", "verify", "../../x"], "names no adapter"),
        (["evaluate", "../../x"], "names no adapter"),
        (["generate", "../../x", "--prompt", "a"], "names no adapter"),
        (["promote", "../../x"], "names no adapter"),
        (["promote", "../../x@champion"], "is not a registered model"),
        (["promote", "acme.menus@../../x"], "there is no alias"),
        (["promote", "{adapter}", "--task", "../../x"], "../../x"),
        (["promote", "{adapter}", "--tenant", "../../x"], "../../x"),
        (["rollback", "../../x"], "is not a registered model"),
        (["rollback", "acme.menus", "--to", "../../x"], "no champion"),
        (["history", "../../x"], "is not a registered model"),
        (["adapters", "list", "--tenant", "../../x"], "../../x"),
        (["adapters", "import", "{folder}", "--base", "{base}", "--tenant", "../../x"], "../../x"),
        (["adapters", "import", "{folder}", "--base", "{base}", "--tenant", "acme", "--task", "../x"], "../x"),
        (["jobs", "show", "../../x"], "names no job"),
        (["base", "show", "../../x"], "../../x"),
        (["evaluate", "{adapter}", "--data", "../../nothing.jsonl"], "nothing.jsonl"),
        (["evaluate", "{adapter}", "--base", "nowhere"], "nowhere"),
        (["generate", "{adapter}", "--data", "nothing.jsonl"], "nothing.jsonl"),
        (["promote", "{adapter}", "--base", "nowhere"], "nowhere"),
        (["train", "nothing.yaml"], "nothing.yaml"),
        (["adapters", "import", "nothing", "--base", "{base}", "--tenant", "acme"], "there is no adapter folder nothing"),
        (["promote", "{adapter}", "--tenant", "globex"], "no adapter of tenant 'globex'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_name_that_leads_astray_is_one_sentence(copied: CommandLine, trained: Trained, command: list[str], said: str) -> None:
    store = copied.store.root / "tenants" / "acme" / trained.base_id
    places = {"adapter": trained.adapter_id, "base": trained.base, "folder": store / "adapters" / trained.adapter_id}
    before = copied.listing()
    ended = copied(*(word.format(**places) for word in command))
    assert ended.code == 2
    assert said in ended.sentence
    assert copied.listing() == before


def test_adapter_of_another_tenant_is_not_continued(copied: CommandLine, trained: Trained) -> None:
    path = job_file(copied.folder, trained, trained.base)
    path.write_text(path.read_text().replace("tenant: acme", "tenant: globex"))
    ended = copied("train", path)
    assert ended.code == 2
    assert "no adapter of tenant 'globex'" in ended.sentence
    path.write_text(path.read_text().replace(trained.adapter_id, "acme.menus@champion"))
    assert "belongs to the tenant 'acme'" in copied("train", path).sentence
