"""Merging stored adapters, and measuring one in its served forms, on the command line."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import _run
from tests.pipelines.command_line import CommandLine, Ended, installation
from tests.pipelines.conftest import Trained


@dataclass(frozen=True)
class Pair:
    """The command line where two adapters of one customer were trained, on the same rows from different seeds."""

    cli: CommandLine
    a: str
    b: str
    base: Path

    def merge(self, *options: str | Path) -> Ended:
        return self.cli("adapters", "merge", self.a, self.b, *options)

    def manifests(self) -> dict[str, dict[str, Any]]:
        found = [self.cli("adapters", "show", row["adapter_id"], "--json").json for row in self.rows()]
        return {one["adapter_id"]: one for one in found}

    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.cli("adapters", "list", "--json").json
        return rows


@pytest.fixture(scope="module")
def trained_twice(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twice") / "copy"
    shutil.copytree(trained.folder, folder)
    with installation(folder):
        assert _run(["train", "job.yaml", "--set", "training.seed=1"]) == 0
    return folder


@pytest.fixture
def pair(trained_twice: Path, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Pair]:
    folder = tmp_path / "copy"
    shutil.copytree(trained_twice, folder)
    with installation(folder):
        cli = CommandLine(folder, capsys)
        [other] = [row["adapter_id"] for row in cli("adapters", "list", "--json").json if row["adapter_id"] != trained.adapter_id]
        yield Pair(cli, trained.adapter_id, other, trained.base)


def test_merged_adapter_is_stored_once_with_its_parents_and_is_measured_on_their_rows(pair: Pair) -> None:
    options = ("--method", "ties", "--density", "0.7", "--rank", "4", "--tolerance", "1", "--json")
    first, again = pair.merge(*options).json, pair.merge(*options).json
    assert (first["merged"], again["merged"]) == (True, False)
    assert again["adapter_id"] == first["adapter_id"]
    assert (first["tenant"], first["task"]) == ("acme", "menus")
    manifest = pair.manifests()[first["adapter_id"]]
    assert manifest["parents"] == [pair.a, pair.b]
    made = manifest["merge"]
    assert (made["method"], made["density"], made["rank"], made["seed"], made["forced"]) == ("ties", 0.7, 4, 0, False)
    assert [(one["adapter_id"], one["weight"]) for one in made["parents"]] == [(pair.a, 0.5), (pair.b, 0.5)]
    assert all(0.0 <= layer["error"] <= 1.0 and layer["rank"] == 4 for layer in made["layers"])
    assert [(check["data"], check["num_rows"]) for check in made["checks"]] == [("validation", 4)] * 2
    assert made["checks"][0]["eval/loss"]["parent"] == pytest.approx(pair.manifests()[pair.a]["metrics"]["eval/loss"], rel=1e-5)
    assert pair.cli("adapters", "verify", "--all").code == 0
    measured = pair.cli("evaluate", first["adapter_id"], "--json").json
    assert (measured["data"], measured["num_rows"]) == ("the parents", 8)
    expected = sum(check["eval/loss"]["merged"] for check in made["checks"]) / 2
    assert measured["measured"][1]["metrics"]["eval/loss"] == pytest.approx(expected, rel=1e-4)
    assert f"none: ties of {pair.a}, {pair.b}" in pair.cli("adapters", "show", first["adapter_id"]).out


def test_a_seed_makes_another_adapter_of_the_same_parents(pair: Pair) -> None:
    made = [
        pair.merge("--method", "dare_linear", "--seed", seed, "--force", "--json").json["adapter_id"] for seed in ("0", "1", "0")
    ]
    assert made[0] == made[2] != made[1]


def test_a_merge_worse_than_a_parent_on_its_rows_is_refused_unless_forced(pair: Pair) -> None:
    before = pair.cli.listing()
    command = ("--weights", "-40,-40", "--json")
    refused = pair.merge(*command)
    assert refused.code == 3
    assert "worse by more than the tolerance of 0.05" in refused.sentence
    assert "give --force" in refused.sentence
    assert pair.cli.listing() == before
    forced = pair.merge(*command, "--force")
    assert forced.code == 0
    assert forced.json["merge"]["forced"] is True
    assert pair.manifests()[forced.json["adapter_id"]]["merge"]["forced"] is True
    needless = pair.merge("--tolerance", "1", "--force", "--json").json
    assert needless["merge"]["forced"] is False, "nothing had to be forced"


def test_a_dry_run_reports_conflicts_and_stores_nothing(pair: Pair) -> None:
    before = pair.cli.listing()
    ended = pair.merge("--dry-run", "--json")
    [found] = ended.json["pairs"]
    assert ended.json.keys() == {"base_id", "adapters", "pairs"}
    assert 0.0 < found["sign_conflicts"] < 1.0
    assert len(found["layers"]) == 20
    assert {"module", "sign_conflicts", "cosine", "overlap_in", "overlap_out"} <= found["layers"][0].keys()
    assert pair.cli.listing() == before
    assert "model.layers.4.self_attn.v_proj" in pair.merge("--dry-run").out


WRONG = {
    "--weights 1": "there are 1 weights for 2 adapters",
    "--weights 1,x": "is no list of numbers",
    "--method mean": "there is no method 'mean'",
    "--method ties --density 0": "the density is 0",
    "--method svd --rank 5": "gives 1 to 4",
    "--tenant globex": "give --across-tenants",
    "--task ../../x": "is not a name",
    "--tolerance -1": "the tolerance is -1",
}


@pytest.mark.parametrize("options", WRONG)
def test_what_cannot_be_merged_is_one_sentence(pair: Pair, options: str) -> None:
    ended = pair.merge(*options.split())
    assert ended.code == 2
    assert WRONG[options] in ended.sentence


def test_adapters_of_two_tenants_are_merged_only_where_that_is_said(pair: Pair) -> None:
    [row] = [row for row in pair.rows() if row["adapter_id"] == pair.b]
    imported = pair.cli("adapters", "import", row["uri"], "--base", pair.base, "--tenant", "globex", "--json").json
    references = (pair.a, "globex.menus@champion")
    assert pair.cli("promote", imported["adapter_id"], "--tenant", "globex", "--task", "menus").code == 0
    refused = pair.cli("adapters", "merge", *references)
    assert refused.code == 2
    assert "belong to different tenants (acme, globex)" in refused.sentence
    assert "--tenant" in pair.cli("adapters", "merge", *references, "--across-tenants").sentence
    options = ("--across-tenants", "--tenant", "shared", "--task", "menus", "--tolerance", "1", "--json")
    unmeasured = pair.cli("adapters", "merge", *references, *options)
    assert unmeasured.code == 3
    assert "names no test or validation rows" in unmeasured.sentence
    made = pair.cli("adapters", "merge", *references, *options, "--force").json
    assert (made["tenant"], made["merge"]["forced"]) == ("shared", True)
    assert [parent["tenant"] for parent in made["merge"]["parents"]] == ["acme", "globex"]
    assert "name some with --data" in pair.cli("evaluate", made["adapter_id"]).sentence


def test_adapters_of_other_views_or_bases_are_not_merged(pair: Pair, trained: Trained, tmp_path: Path) -> None:
    other = tmp_path / "base"
    shutil.copytree(trained.base, other)
    config = other / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-03'))
    [row] = [row for row in pair.rows() if row["adapter_id"] == pair.b]
    foreign = pair.cli("adapters", "import", row["uri"], "--base", other, "--tenant", "acme", "--json").json
    ended = pair.cli("adapters", "merge", pair.a, foreign["adapter_id"])
    assert ended.code == 2
    assert f"on different bases ({trained.base_id}, {foreign['base_id']})" in ended.sentence
    wrong = pair.merge("--base", other)
    assert wrong.code == 2
    assert "use the base it was trained on" in wrong.sentence
    halved = ("--set", "base_model.dtype=bfloat16", "--set", "training.max_steps=1", "--json")
    view = pair.cli("train", "job.yaml", *halved).json
    assert "on different views of their base" in pair.cli("adapters", "merge", pair.a, view["adapter_id"]).sentence


def test_forms_of_an_adapter_are_compared_on_its_rows(used: CommandLine, trained: Trained) -> None:
    found = used("evaluate", trained.adapter_id[:8], "--forms", "--json").json
    forms = {form["name"]: form for form in found["forms"]}
    assert list(forms) == ["separate", "hot-swapped", "merged", "merged and quantised"]
    assert forms["hot-swapped"]["is_identical"] is True
    assert forms["merged"]["largest_logit_difference"] < 1e-3
    assert (found["data"], found["num_rows"], found["base_id"]) == ("validation", 4, trained.base_id)
    plain = used("evaluate", trained.adapter_id, "--json").json["measured"][1]["metrics"]["eval/loss"]
    assert forms["separate"]["metrics"]["eval/loss"] == pytest.approx(plain, rel=1e-6)
    assert "none, bit for bit" in used("evaluate", trained.adapter_id, "--forms").out
    assert "one adapter at a time" in used("evaluate", trained.adapter_id, trained.adapter_id, "--forms").sentence
    assert "leave out --generate" in used("evaluate", trained.adapter_id, "--forms", "--generate", "1").sentence
