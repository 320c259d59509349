"""Gates on the command line: who may become champion, on which evidence, and what is written of it. MLflow is away throughout."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.errors import WorkFailed
from infra.fingerprint import id_of_json
from pipelines.cli import _run
from pipelines.evidence import Binding, find_evaluation, read, refuse_stale
from pipelines.journal import Change, commit, history, read_head
from tests.pipelines.command_line import CommandLine, installation
from tests.pipelines.conftest import Trained
from workers import layout
from workers.adapter import make_adapter
from workers.adapter_store import load_adapter, store_adapter
from workers.manifests import AdapterRef

MODEL = "acme.menus"
STRICT = "- {kind: better_than_champion, metric: eval/loss, min_effect: 0.005}\n- {kind: effect}\n"
PACKAGE = """
from pipelines.gates import Verdict
from pipelines.promote import promote

class Named:
    def __init__(self, letter):
        self.name, self.letter = f"named {letter}", letter

    def evaluate(self, context):
        return Verdict(self.name, self.letter in context.challenger.adapter_id, "looked at the id", {"letter": self.letter})

class Hasty:
    name = "hasty"

    def __init__(self, rival):
        self.rival = rival

    def evaluate(self, context):
        if context.champion is None:
            promote(context.store, None, self.rival, actor="rival")
        scores = context.scores("champion" if context.champion else "base", None, "eval/loss")
        return Verdict(self.name, scores.num_rows == 4, "let somebody else be faster")

class Broken:
    name = "broken"

    def evaluate(self, context):
        raise KeyError("nothing")

class Vague(Broken):
    def evaluate(self, context):
        return True
"""


@pytest.fixture(scope="module")
def home(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installation of `trained`, with an adapter that is better and one that is worse than the plain base."""
    folder = tmp_path_factory.mktemp("gated")
    shutil.copytree(trained.folder, folder, dirs_exist_ok=True)
    with installation(folder):
        assert _run(["train", "job.yaml", "--set", "training.max_steps=24"]) == 0
        command = CommandLine(folder, None)  # type: ignore[arg-type]
        stored = load_adapter(command.store, "acme", trained.base_id, trained.adapter_id)
        spoilt = {name: tensor * (-30 if "lora_B" in name else 1) for name, tensor in stored.adapter.tensors.items()}
        store_adapter(
            command.store, "acme", trained.base_id, make_adapter(stored.adapter.config, spoilt, "a test"), stored.manifest
        )
    return folder


@pytest.fixture
def gated(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[CommandLine]:
    folder = shutil.copytree(home, tmp_path / "gated")
    with installation(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAFLEET_TRACKING_URI", "http://127.0.0.1:9")
        yield CommandLine(folder, capsys)


@pytest.fixture
def ids(gated: CommandLine, trained: Trained) -> tuple[str, str, str]:
    """Adapters: of a few steps, of more steps, worse than the plain base."""
    known = {path.stem for path in gated.store.root.glob("tenants/acme/*/manifests/*.json")} - {trained.adapter_id}
    jobs = {path.name: path for path in gated.store.root.glob("tenants/acme/*/jobs/*")}
    [better] = [
        one for one in known for job in jobs.values() if job.name != trained.job_id and one in (job / "state.json").read_text()
    ]
    [worse] = known - {better}
    return trained.adapter_id, better, worse


def gates_of(gated: CommandLine, text: str) -> Path:
    path = gated.folder / "gates.yaml"
    path.write_text(text)
    return path


def evidence_of(gated: CommandLine, entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(gated.store.get(key)[0]) for key in entry["evidence"]]


def test_first_champion_is_compared_with_the_plain_base_row_by_row(gated, ids, trained) -> None:
    few, _, _ = ids
    ended = gated("promote", few, "--gates", gates_of(gated, STRICT), "--json")
    assert (ended.code, ended.json["changed"], ended.json["forced"]) == (0, True, False)
    assert [(one["gate"], one["passed"]) for one in ended.json["verdicts"]] == [("better_than_champion", True), ("effect", True)]
    assert "the plain base" in ended.json["verdicts"][0]["sentence"]
    promotion, evaluation = evidence_of(gated, ended.json)
    for found in (promotion, evaluation):
        assert (found["adapter_id"], found["base_id"], found["task"]) == (few, trained.base_id, "menus")
        assert found["compared_with"] is None
        assert found["gates_digest"] == id_of_json(promotion["gates"])
    assert promotion["evaluations"] == ended.json["evidence"][1:]
    assert promotion["verdicts"] == ended.json["verdicts"]
    assert evaluation["data"]["num_rows"] == 4
    measured = gated("evaluate", few, "--json").json["measured"]
    for side, whole in zip(("base", "challenger"), measured, strict=True):
        rows = evaluation["scores"][side]
        assert len(rows["loss"]) == 4
        assert sum(rows["loss"]) / sum(rows["num_targets"]) == pytest.approx(whole["metrics"]["eval/loss"], rel=1e-9)
        assert sum(rows["num_correct"]) / sum(rows["num_targets"]) == whole["metrics"]["eval/token_accuracy"]


def test_later_one_is_compared_with_the_champion_and_evidence_names_it(gated, ids) -> None:
    few, more, _ = ids
    gates = gates_of(gated, STRICT)
    assert gated("promote", few, "--gates", gates).code == 0
    ended = gated("promote", more, "--gates", gates, "--json")
    assert ended.code == 0, ended.err
    promotion, evaluation = evidence_of(gated, ended.json)
    assert promotion["compared_with"]["adapter_id"] == evaluation["compared_with"]["adapter_id"] == few
    assert promotion["compared_with"]["generation"] == ended.json["generation"] - 1 == 1
    assert set(evaluation["scores"]) == {"challenger", "champion"}


def test_refused_adapter_does_not_become_champion_and_its_evidence_stays(gated, ids) -> None:
    few, more, worse = ids
    gates = gates_of(gated, STRICT)
    assert gated("promote", more, "--gates", gates).code == 0
    ended = gated("promote", worse, "--gates", gates)
    assert ended.code == 3
    assert "better_than_champion  refused" in ended.out
    assert "effect                passed" in ended.out
    assert f"{worse[:12]} does not become champion of {MODEL} (better_than_champion: eval/loss" in ended.sentence
    told = gated("promote", worse, "--gates", gates, "--json")
    assert (told.code, told.json["changed"], told.json["adapter_id"]) == (3, False, worse)
    assert [one["passed"] for one in told.json["verdicts"]] == [False, True]
    assert [entry.adapter_id for entry in history(gated.store, "acme", "menus")] == [more]
    assert len(list(gated.store.list(layout.evidence_of("acme", worse)))) == 2, "asked twice, found once"


def test_forced_promotion_is_recorded_as_such_with_its_reason(gated, ids) -> None:
    few, _, worse = ids
    gates = gates_of(gated, STRICT + "- {kind: guard, data: missing.jsonl}\n")
    assert "needs a reason" in gated("promote", worse, "--gates", gates, "--force").sentence
    ended = gated("promote", worse, "--gates", gates, "--force", "--reason", "a demonstration", "--json")
    assert (ended.code, ended.json["forced"], ended.json["reason"]) == (0, True, "a demonstration")
    verdicts = evidence_of(gated, ended.json)[0]["verdicts"]
    assert [one["passed"] for one in verdicts] == [False, True, False]
    assert "could not be run" in verdicts[2]["sentence"]
    assert "promote (forced)" in gated("history", MODEL).out


def test_gates_of_the_home_hold_where_none_are_named(gated, ids) -> None:
    _, more, worse = ids
    assert gated("promote", more).code == 0, "no gates at all"
    (gated.home / "gates.yaml").write_text(STRICT)
    assert gated("promote", worse).code == 3
    assert gated("promote", worse, "--gates", gates_of(gated, "[]\n")).code == 0


def test_guard_holds_the_champions_level_on_rows_of_a_file(gated, ids, trained) -> None:
    few, more, worse = ids
    shutil.copy(trained.folder / "train.jsonl", gated.folder / "guard.jsonl")
    gates = gates_of(gated, "- {kind: guard, data: guard.jsonl, metric: eval/token_accuracy, max_regression: 0.05}\n")
    assert gated("promote", more, "--gates", gates).code == 0
    ended = gated("promote", worse, "--gates", gates, "--json")
    assert ended.code == 3
    assert ended.json["verdicts"][0]["figures"]["regression"] > 0.05
    answers = gates_of(gated, "- {kind: guard, data: guard.jsonl, metric: eval/exact_match}\n- {kind: better_than_base}\n")
    ended = gated("promote", few, "--gates", answers, "--json")
    assert ended.code == 0, ended.err
    by_rows = {found["data"]["num_rows"]: found["scores"] for found in evidence_of(gated, ended.json)[1:]}
    assert len(by_rows[16]["challenger"]["exact_match"]) == 16
    assert by_rows[4]["challenger"]["exact_match"] is None, "answers are generated where a gate asks for them only"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- {kind: better_then_base}\n", "Did you mean 'better_than_base'?"),
        ("- {kind: zzz}\n", "There is: better_than_champion, better_than_base, guard, effect, signed_by"),
        ("kind: effect\n", "should be a list of gates"),
        ("- {metric: eval/loss}\n", "gate 1 names no kind"),
        ("- {kind: effect}\n- {kind: guard, dta: x}\n", "gate 2 (guard): unknown key 'dta'. Did you mean 'data'?"),
        ("- {kind: guard, data: g.jsonl, metric: eval/perplexity}\n", "'metric': should be 'eval/loss', "),
        ("- {kind: guard, data: missing.jsonl}\n", "missing.jsonl"),
        ("- {kind: guard, data: empty.jsonl}\n", "empty.jsonl"),
        ("- {kind: better_than_base, data: one.jsonl}\n", "1 row to compare on is too few"),
        ("- {kind: better_than_base, metric: eval/format_validity, data: two.jsonl}\n", "cannot be measured on these rows"),
        ("- {kind: signed_by, public_key: key.pub}\n", "key.pub, which is no file"),
    ],
)
def test_gates_that_cannot_be_used_are_one_sentence(gated, ids, trained, text: str, said: str) -> None:
    rows = (trained.folder / "valid.jsonl").read_text().splitlines(keepends=True)
    for name, number in (("empty", 0), ("one", 1), ("two", 2)):
        (gated.folder / f"{name}.jsonl").write_text("".join(rows[:number]))
    known = gated.store
    if "format_validity" in text:  # an adapter whose job had no pattern
        stored = load_adapter(known, "acme", trained.base_id, ids[0])
        body = {key: value for key, value in stored.manifest.items() if key not in ("job_id", "data")}
        store_adapter(known, "globex", trained.base_id, stored.adapter, body | {"imported": {"base_path": str(trained.base)}})
        ended = gated("promote", ids[0], "--tenant", "globex", "--gates", gates_of(gated, text))
    else:
        ended = gated("promote", ids[0], "--gates", gates_of(gated, text))
    assert ended.code == 2
    assert said in ended.sentence
    assert read_head(known, "acme", "menus") is None


def test_adapter_without_held_out_rows_is_sent_to_a_file(gated, ids, trained) -> None:
    stored = load_adapter(gated.store, "acme", trained.base_id, ids[0])
    body = {key: value for key, value in stored.manifest.items() if key not in ("job_id", "data")}
    store_adapter(gated.store, "globex", trained.base_id, stored.adapter, body | {"imported": {"base_path": str(trained.base)}})
    ended = gated("promote", ids[0], "--tenant", "globex", "--gates", gates_of(gated, STRICT))
    assert (ended.code, "there are no rows to compare on" in ended.sentence) == (2, True)
    named = gates_of(gated, f"- {{kind: better_than_base, data: '{trained.folder / 'valid.jsonl'}'}}\n")
    assert gated("promote", ids[0], "--tenant", "globex", "--gates", named).code == 0


def test_evidence_found_against_another_champion_is_neither_reused_nor_accepted(gated, ids, trained) -> None:
    few, more, worse = ids
    gates = gates_of(gated, STRICT)
    assert gated("promote", few, "--gates", gates).code == 0
    assert gated("promote", worse, "--gates", gates).code == 3
    store, challenger = gated.store, AdapterRef("acme", trained.base_id, worse)
    head = read_head(store, "acme", "menus")
    keys = tuple(info.key for info in store.list(layout.evidence_of("acme", worse)))
    [body] = [found for found in (read(store, key) for key in keys) if found["kind"] == "evaluation"]
    setting = {key: value for key, value in body["setting"].items() if key != "numerics"}
    binding = Binding(challenger, "menus", head, body["gates_digest"])
    refuse_stale(store, keys, binding)
    assert set(find_evaluation(store, binding, body["data"]["digest"], setting)) == {"challenger", "champion"}
    assert gated("freeze", MODEL).code == gated("unfreeze", MODEL).code == 0
    later = Binding(challenger, "menus", read_head(store, "acme", "menus"), body["gates_digest"])
    for other in (later, Binding(challenger, "menus", head, None), Binding(challenger, "other", head, body["gates_digest"])):
        with pytest.raises(WorkFailed, match="against another champion, or for other gates"):
            refuse_stale(store, keys, other)
        assert find_evaluation(store, other, body["data"]["digest"], setting) == {}
    assert find_evaluation(store, binding, "a" * 32, setting) == {}
    assert find_evaluation(store, binding, body["data"]["digest"], setting | {"max_length": 1}) == {}


def test_altered_scores_are_measured_again_and_mended(gated, ids) -> None:
    few, _, worse = ids
    gates = gates_of(gated, STRICT)
    assert gated("promote", few, "--gates", gates).code == 0
    assert gated("promote", worse, "--gates", gates).code == 3
    store = gated.store
    whole = {info.key: store.get(info.key)[0] for info in store.list(layout.evidence_of("acme", worse))}
    [key] = [key for key, data in whole.items() if json.loads(data)["kind"] == "evaluation"]
    body = json.loads(whole[key])
    body["scores"]["challenger"]["loss"] = [0.0] * 4
    store.put(key, json.dumps(body).encode())
    assert gated("promote", worse, "--gates", gates).code == 3
    assert {info.key: store.get(info.key)[0] for info in store.list(layout.evidence_of("acme", worse))} == whole


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that brings gates."""
    folder = tmp_path / "site"
    (folder / "menu_gates-1.0.dist-info").mkdir(parents=True)
    (folder / "menu_gates.py").write_text(PACKAGE)
    (folder / "menu_gates-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: menu-gates\nVersion: 1.0\n")
    points = "".join(f"{name} = menu_gates:{name.title()}\n" for name in ("named", "hasty", "broken", "vague"))
    (folder / "menu_gates-1.0.dist-info" / "entry_points.txt").write_text(f"[lorafleet.gates]\n{points}")
    monkeypatch.syspath_prepend(str(folder))


def test_gate_of_another_package_judges_like_our_own(gated, ids, package) -> None:
    few, _, _ = ids
    assert gated("promote", few, "--gates", gates_of(gated, "- {kind: named, letter: '0'}\n")).code == 3
    ended = gated("promote", few, "--gates", gates_of(gated, f"- {{kind: named, letter: {few[0]!r}}}\n"), "--json")
    assert (ended.code, ended.json["verdicts"][0]["gate"]) == (0, f"named {few[0]}")
    assert evidence_of(gated, ended.json)[0]["gates"] == [{"kind": "named", "letter": few[0]}]


def test_gate_of_another_package_that_fails_lets_nobody_pass(gated, ids, package) -> None:
    few, _, _ = ids
    for text, code, said in (
        ("- {kind: broken}\n", 1, "the gate 'broken' failed (KeyError: 'nothing')"),
        ("- {kind: vague}\n", 1, "returned bool, expected a Verdict"),
        ("- {kind: named, leter: a}\n", 2, "gate 1: the gate 'named' of menu_gates:Named cannot be made (TypeError"),
        ("- {kind: namd}\n", 2, "Did you mean 'named'?"),
    ):
        ended = gated("promote", few, "--gates", gates_of(gated, text))
        assert (ended.code, said in ended.sentence) == (code, True), ended.err
    assert read_head(gated.store, "acme", "menus") is None


def test_promoter_who_was_overtaken_is_judged_anew_against_the_new_champion(gated, ids, package) -> None:
    few, more, _ = ids
    gates = gates_of(gated, f"- {{kind: hasty, rival: {few}}}\n- {{kind: better_than_champion}}\n")
    ended = gated("promote", more, "--gates", gates, "--json")
    assert ended.code == 0, ended.err
    first, second = history(gated.store, "acme", "menus")
    assert (first.actor, first.adapter_id, second.adapter_id, second.previous) == ("rival", few, more, few)
    for found in evidence_of(gated, ended.json):
        assert found["compared_with"]["generation"] == 1
        assert found["compared_with"]["adapter_id"] == few


def test_unsigned_adapter_does_not_pass_a_gate_that_wants_a_signature(gated, ids) -> None:
    pytest.importorskip("pipelines.signing")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    (gated.folder / "key.pub").write_bytes(public.public_bytes(serialization.Encoding.PEM, form))
    ended = gated("promote", ids[0], "--gates", gates_of(gated, "- {kind: signed_by, public_key: key.pub}\n"))
    assert (ended.code, "signed_by: is not signed with the key of key.pub" in ended.sentence) == (3, True), ended.err


def test_frozen_model_keeps_its_champion_until_it_is_unfrozen(gated, ids) -> None:
    few, more, worse = ids
    assert "has no champion yet" in gated("freeze", MODEL).sentence
    assert gated("promote", few).code == gated("promote", more).code == 0
    frozen = gated("freeze", MODEL, "--reason", "audit", "--json").json
    assert (frozen["kind"], frozen["adapter_id"], frozen["generation"], frozen["changed"]) == ("freeze", more, 3, True)
    assert "is frozen already" in gated("freeze", MODEL).out
    for command in (["promote", worse], ["promote", worse, "--force", "--reason", "x"], ["rollback", MODEL], ["promote", more]):
        ended = gated(*command)
        assert ended.code == 2
        assert "was frozen by" in ended.sentence
        assert "(generation 3: audit)" in ended.sentence
        assert f"lorafleet unfreeze {MODEL}" in ended.sentence
    assert gated("unfreeze", MODEL).code == 0
    assert "is open to promotions already" in gated("unfreeze", MODEL).out
    back = gated("rollback", MODEL, "--json").json
    assert (back["adapter_id"], back["generation"]) == (few, 5)
    assert gated("freeze", MODEL).code == gated("unfreeze", MODEL).code == 0
    assert not gated("rollback", MODEL, "--json").json["changed"], "it was rolled back, whatever was frozen since"
    kinds = [entry.kind for entry in history(gated.store, "acme", "menus")]
    assert kinds == ["promote", "promote", "freeze", "unfreeze", "rollback", "freeze", "unfreeze"]


def test_history_says_who_served_at_a_time(cli: CommandLine) -> None:
    start, base_id = 1762000000.0, "b" * 32
    rows = [("promote", "a", 0), ("promote", "c", 100), ("freeze", "c", 200), ("unfreeze", "c", 250), ("rollback", "a", 300)]
    for generation, (kind, letter, after) in enumerate(rows):
        change = Change(kind=kind, adapter_id=letter * 32, base_id=base_id, actor="ann", previous=None, at=start + after)  # type: ignore[arg-type]
        commit(cli.store, "acme", "menus", change, generation)

    def served(text: str) -> dict[str, Any]:
        return cli("history", MODEL, "--at", text, "--json").json

    assert served("2025-11-01T12:26:39Z")["adapter_id"] is None
    first = served("2025-11-01T12:26:40Z")
    assert (first["adapter_id"], first["generation"], first["since"], first["frozen"]) == ("a" * 32, 1, start, False)
    assert served("2025-11-01T12:28:19")["generation"] == 1, "without a zone it is UTC"
    assert served("2025-11-01T13:28:20+01:00")["adapter_id"] == "c" * 32
    frozen = served("2025-11-01T12:30:10Z")
    assert (frozen["adapter_id"], frozen["generation"], frozen["frozen"]) == ("c" * 32, 2, True)
    assert served("2025-11-02")["adapter_id"] == "a" * 32
    text = cli("history", MODEL, "--at", "2025-11-01T12:30:10Z").out
    assert text.startswith(
        f"{'c' * 32} served {MODEL} at 2025-11-01T12:30:10Z (generation 2, champion since 2025-11-01T12:28:20Z"
    )
    assert "had no champion yet" in cli("history", MODEL, "--at", "2020-01-01").out
    for bad, said in (("yesterday", "is not a time"), ("2025-13-01", "ISO 8601"), ("2999-01-01", "has not come yet")):
        ended = cli("history", MODEL, "--at", bad)
        assert (ended.code, said in ended.sentence) == (2, True)
    assert "Did you mean 'acme.menus'?" in cli("history", "acme.menu", "--at", "2025-11-02").sentence


def test_schema_of_gates_is_printed(cli: CommandLine) -> None:
    shown = cli("schema", "gates").json
    assert {"BetterThanChampion", "BetterThanBase", "Guard", "Effect", "SignedBy"} <= shown["$defs"].keys()
