"""What is done to a customer's rows before training: poison is put aside, collapsed data held, deletions honoured."""

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from infra.errors import BadInput, ObjectNotFound, ServiceUnavailable
from infra.local_storage import LocalStorage
from infra.storage import Storage
from infra.stores import open_store
from infra.strict import parse
from pipelines.nightly import records
from pipelines.nightly.care import Cared, look_after, save_quarantine
from tests.pipelines.nightly.poison import BOMB, BOMB_TEMPLATE, poisons, write_base_with_bomb, write_poisoned
from workers.data.render import Renderer
from workers.data.rows import Row, row_bytes
from workers.data.splits import Splits
from workers.data.template import ForeignTemplate, TemplateLimits
from workers.data.tokenizer import load_tokenizer
from workers.resolve import Resolver
from workers.spec import JobSpec

HUGE_BYTES = 8 << 20
DAY = 86400.0


@dataclass(frozen=True)
class Customer:
    """A customer as care sees it."""

    folder: Path
    job: JobSpec
    holdout: float = 0.1
    min_rows: int = 20
    max_drop: float = 0.9
    max_quarantined: float = 0.2
    min_new_rows: int = 20
    max_age_days: float | None = None


@dataclass
class Desk:
    """A folder of one customer's rows, and what was trained on last."""

    folder: Path
    base: str = "none"
    last: records.Row | None = None
    trained: list[Row] = field(default_factory=list)
    num_loads: int = 0

    def customer(self, **options: Any) -> Customer:
        sections: dict[str, Any] = {name: options.pop(name) for name in ("data", "training", "task_type") if name in options}
        raw = {
            "tenant": "acme",
            "task": "support",
            "base_model": {"name_or_path": self.base},
            "data": {"train": str(self.folder)} | sections.pop("data", {}),
            **sections,
        }
        return Customer(self.folder, parse(JobSpec, raw, "job.yaml"), **options)

    def care(self, renderer_of: Any = None, now: float = 0.0, **options: Any) -> Cared:
        return look_after(self.customer(**options), renderer_of, self.last, self._load, open_store, now)

    def train(self, cared: Cared, at: float = 0.0) -> None:
        """Note that what was cared for has been trained on."""
        self.trained = cared.train
        self.last = records.Row(
            "acme", "support", "promoted", care=cared.care, train_digest="a" * 32, trained_at=at, num_rows=len(cared.train)
        )

    def _load(self) -> list[Row]:
        self.num_loads += 1
        return self.trained

    def write(self, rows: Sequence[dict[str, Any]], name: str = "train.jsonl") -> None:
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def chat(*turns: str, system: str | None = None) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(turns)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


def chats(numbers: Sequence[int], suffix: str = "") -> list[dict[str, Any]]:
    return [chat(f"What is the number {number} in words of the trade?", f"It is {number}{suffix}.") for number in numbers]


def bodies(rows: Sequence[Row]) -> list[bytes]:
    return [row_bytes(row) for row in rows]


def questions(rows: Sequence[Row]) -> set[str]:
    return {row.body["messages"][0]["content"] for row in rows}


@pytest.fixture(scope="module")
def healthy(test_data: Path) -> list[str]:
    return (test_data / "sets/snips/customers/get-weather/train.jsonl").read_text().splitlines()[:200]


@pytest.fixture(scope="module")
def talk(test_data: Path) -> Renderer:
    return Renderer(load_tokenizer(test_data / "bases/talk-5m"), 96)


@pytest.mark.parametrize("name", poisons())
def test_every_poison_ends_as_its_row_should_and_nothing_is_raised(
    tmp_path: Path, healthy: list[str], talk: Renderer, name: str
) -> None:
    poison = poisons(HUGE_BYTES)[name]
    poison.write(tmp_path, healthy)
    cared = Desk(tmp_path).care(lambda job, labels: talk.for_job(job.training.max_length, labels))
    assert (cared.hold.reason if cared.hold else "") == poison.reason
    if cared.hold:
        assert cared.hold.sentence.endswith((".", ")"))
        assert cared.hold.next_step
    else:
        assert len(cared.train) + len(cared.holdout) > 90
    if poison.num_bad is not None:
        assert cared.care.num_quarantined == poison.num_bad
    assert all(text.isprintable() for entry in cared.quarantine for text in entry)
    json.dumps(records.Row("acme", "support", "held", care=cared.care).to_json(), ensure_ascii=False).encode()


def test_the_helper_writes_a_folder_for_every_kind(tmp_path: Path, healthy: list[str]) -> None:
    written = write_poisoned(tmp_path, healthy, HUGE_BYTES)
    assert {path.name for path in tmp_path.iterdir()} == written.keys()
    assert {poison.reason for poison in written.values()} >= {"", "unreadable", "too_many_bad_rows", "too_few_rows", "one_answer"}


MEASURE = """
import resource, sys
from pathlib import Path
from workers.data.reading import read_leniently
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
problems = [raw.problem for raw in read_leniently(Path(sys.argv[1]), "x") if raw.problem]
print(len(problems), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kind", ["huge-line", "huge-csv"])
def test_a_line_of_any_length_costs_no_more_memory_than_the_limit(tmp_path: Path, healthy: list[str], kind: str) -> None:
    poisons(256 << 20)[kind].write(tmp_path, healthy)
    [path] = tmp_path.iterdir()
    said = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True).stdout
    num_problems, kibibytes = map(int, said.split())
    assert num_problems == 1
    assert kibibytes < 32 << 10


def test_bad_rows_are_named_and_the_others_trained(desk: Desk) -> None:
    desk.write([*chats(range(30)), {"messages": [{"role": "user", "content": "And?"}]}, *chats(range(30, 40))])
    cared = desk.care()
    assert cared.quarantine == (
        (f"{desk.folder}/train.jsonl:31", "has no assistant message to train on; add the answer that should be learned"),
    )
    assert (cared.care.num_read, cared.care.num_quarantined, cared.care.quarantine) == (40, 1, cared.quarantine)
    assert cared.hold is None
    assert cared.skip is None


def test_the_list_of_bad_rows_is_kept_once_under_the_tenant(desk: Desk, local_store: LocalStorage) -> None:
    (desk.folder / "train.jsonl").write_text("\n".join([*map(json.dumps, chats(range(30))), '{"prompt": "my secret"}']))
    cared = desk.care()
    key = save_quarantine(local_store, "acme", cared)
    assert key == save_quarantine(local_store, "acme", cared)
    assert key is not None
    assert key.startswith("tenants/acme/quarantine/")
    [line] = local_store.get(key)[0].decode().splitlines()
    assert json.loads(line).keys() == {"where", "problem"}
    assert "secret" not in line
    (desk.folder / "train.jsonl").write_text("\n".join(map(json.dumps, chats(range(30)))))
    assert save_quarantine(local_store, "acme", desk.care()) is None


def test_no_row_leaves_the_holdout_as_data_grows(desk: Desk) -> None:
    held: set[str] = set()
    trained: set[str] = set()
    for day in range(1, 9):
        desk.write(chats(range(40 * day)) + chats(range(0, 40 * day, 3), suffix=", said again"))
        cared = desk.care()
        held |= questions(cared.holdout)
        trained |= questions(cared.train)
        assert 0.02 < len(questions(cared.holdout)) / (40 * day) < 0.25
    assert len(held | trained) == 320
    assert not held & trained


@pytest.mark.parametrize(
    "change",
    [
        lambda number: chat(question(number), "Another answer."),
        lambda number: chat(question(number), "Yes.", "And now?", f"No {number}."),
        lambda number: chat(question(number), f"It is {number}.", system="Be kind today."),
        lambda number: chat(f"  {question(number).upper()} ", f"It is {number}."),
    ],
    ids=["another answer", "it goes on", "another system prompt", "other case"],
)
def test_a_question_keeps_its_side_whatever_becomes_of_its_row(desk: Desk, change: Any) -> None:
    desk.write([chat(question(number), f"It is {number}.") for number in range(100)])
    held = {text.strip().lower() for text in questions(desk.care().holdout)}
    desk.write([change(number) for number in range(100)])
    users = [message["content"] for row in desk.care().holdout for message in row.body["messages"] if message["role"] == "user"]
    assert held == {text.strip().lower() for text in users if text != "And now?"}
    assert len(held) > 3


def question(number: int) -> str:
    return f"Please tell me what the number {number} is."


def test_conversations_that_begin_with_a_greeting_are_told_apart_by_what_follows(desk: Desk) -> None:
    desk.write([chat("Hi", "Hello!", question(number), f"It is {number}.") for number in range(200)])
    assert 5 < len(desk.care().holdout) < 40


def test_validation_is_drawn_from_what_the_holdout_left(desk: Desk) -> None:
    desk.write(chats(range(400)))
    before = desk.care()
    cared = desk.care(data={"validation_split": 0.2})
    assert bodies(cared.holdout) == bodies(before.holdout)
    assert cared.validation is not None
    assert 40 < len(cared.validation) < 110
    assert sorted(bodies(cared.validation) + bodies(cared.train)) == sorted(bodies(before.train))


def test_own_test_rows_take_the_place_of_the_share_and_leave_the_training_rows(desk: Desk) -> None:
    desk.write(chats(range(100)))
    desk.write(chats(range(90, 120), suffix=" or so"), "test.jsonl")
    desk.write(chats([5, 6, 119]), "valid.jsonl")
    cared = desk.care()
    assert len(cared.holdout) == 30
    assert cared.validation is not None
    assert questions(cared.validation) == questions([Row(row, "") for row in chats([5, 6])])
    assert len(cared.train) == 100 - 10 - 2
    assert cared.care.num_overlap == 10 + 2 + 1


def test_repeated_rows_count_once(desk: Desk) -> None:
    desk.write(chats(range(50)))
    once = desk.care()
    desk.write(chats(range(50)) + chats(range(10)))
    cared = desk.care()
    assert cared.care.num_duplicates == 10
    assert (cared.digest, bodies(cared.train)) == (once.digest, bodies(once.train))


def test_the_digest_knows_rows_and_their_use_and_nothing_else(desk: Desk) -> None:
    desk.write(chats(range(50)))
    digest = desk.care().digest
    desk.write(list(reversed(chats(range(50)))))
    assert desk.care().digest == digest
    desk.write(chats(range(49)) + chats([49], suffix="!"))
    assert desk.care().digest != digest
    desk.write(chats(range(40)))
    desk.write(chats(range(40, 50)), "valid.jsonl")
    assert desk.care().digest != digest


def test_few_new_rows_are_waited_for_until_the_training_is_old(desk: Desk) -> None:
    desk.write(chats(range(100)))
    desk.train(desk.care())
    assert desk.num_loads == 0
    waits = desk.care()
    assert desk.num_loads == 1
    assert waits.skip is not None
    assert (waits.skip.reason, waits.hold, waits.care.num_new) == ("too_few_new_rows", None, 0)
    desk.write(chats(range(110)))
    few = desk.care(max_age_days=7.0, now=6.9 * DAY)
    assert few.skip is not None
    assert "0 < " not in few.skip.sentence
    assert few.skip.sentence.startswith(f"{few.care.num_new} new training rows")
    assert desk.care(max_age_days=7.0, now=7 * DAY).skip is None
    desk.write(chats(range(100)))
    assert desk.care(max_age_days=7.0, now=7 * DAY).skip is not None
    desk.write(chats(range(140)))
    assert desk.care().skip is None


def test_one_deleted_row_is_reason_enough_to_train_and_not_to_continue(desk: Desk) -> None:
    desk.write(chats(range(100)))
    before = desk.care()
    desk.train(before)
    gone = before.train[0].body
    desk.write([row for row in chats(range(100)) if row != gone])
    cared = desk.care()
    assert (cared.skip, cared.hold) == (None, None)
    assert (cared.care.num_new, cared.care.num_deleted) == (0, 1)
    assert cared.num_gone(before.train) == 1
    assert cared.num_gone(cared.train) == 0


def test_collapsed_data_is_held_and_stays_so_until_it_is_restored(desk: Desk) -> None:
    desk.write(chats(range(1000)))
    desk.train(desk.care())
    desk.write(chats(range(100)))
    for _ in range(2):
        cared = desk.care()
        assert cared.hold is not None
        assert (cared.hold.reason, cared.skip) == ("collapsed", None)
        assert "100 good rows are left of 1000" in cared.hold.sentence
        desk.last = records.Row("acme", "support", "held", care=cared.care, train_digest="a" * 32)
    assert desk.care(max_drop=1.0).hold is None
    desk.write(chats(range(101)))
    assert desk.care().hold is None


def test_rows_trained_on_last_that_are_gone_are_no_obstacle(desk: Desk) -> None:
    desk.write(chats(range(100)))
    desk.train(desk.care())

    def lost() -> list[Row]:
        raise ObjectNotFound("the store keeps no rows aaaa.")

    cared = look_after(desk.customer(), None, desk.last, lost, open_store)
    assert (cared.skip, cared.hold) == (None, None)
    assert "keeps no rows" in cared.care.notes[0]


def test_an_empty_holdout_is_no_base_for_a_comparison(desk: Desk) -> None:
    desk.write(chats(range(30)))
    cared = desk.care(holdout=0.0001)
    assert cared.hold is not None
    assert "holdout" in cared.hold.sentence
    assert desk.care(holdout=0.0).hold is None


@pytest.mark.parametrize(("num_rows", "is_held"), [(1, True), (2, False)])
def test_a_holdout_of_one_row_waits_for_another_before_anything_is_trained(desk: Desk, num_rows: int, is_held: bool) -> None:
    desk.write(chats(range(60)))
    desk.write(chats(range(1000, 1000 + num_rows)), "test.jsonl")
    cared = desk.care()
    assert len(cared.holdout) == num_rows
    assert (cared.hold is not None) is is_held
    assert cared.hold is None or cared.hold.reason == "too_few_rows"


def labelled(labels: Sequence[str]) -> list[dict[str, Any]]:
    return [{"text": f"Message {number} about {label}.", "label": label} for number, label in enumerate(labels)]


def test_a_classifier_with_one_label_is_held(desk: Desk) -> None:
    desk.write(labelled(["spam"] * 50))
    cared = desk.care(task_type="SEQ_CLS")
    assert cared.hold is not None
    assert (cared.hold.reason, cared.care.labels) == ("one_label", {"spam": len(cared.train)})
    assert "'spam'" in cared.hold.sentence


def test_held_out_rows_with_a_label_nobody_learns_are_left_out(desk: Desk) -> None:
    desk.write(labelled(["spam", "ham"] * 30))
    desk.write(labelled(["spam", "ham", "eggs"]), "test.jsonl")
    cared = desk.care(task_type="SEQ_CLS")
    assert cared.labels == ("ham", "spam")
    assert [row.body["label"] for row in cared.holdout if row.body["label"] == "eggs"] == []
    assert "1 held-out rows bear labels that no training row has" in cared.care.notes[0]


def test_rows_of_another_kind_than_the_job_trains_on_hold_the_customer(desk: Desk) -> None:
    desk.write(chats(range(50)))
    labels = desk.care(task_type="SEQ_CLS")
    desk.write([{"prompt": str(number), "chosen": "a", "rejected": "b"} for number in range(50)])
    pairs = desk.care()
    for cared in (labels, pairs):
        assert cared.hold is not None
        assert cared.hold.reason == "wrong_kind"


def test_a_row_whose_answer_is_cut_away_is_put_aside(desk: Desk, talk: Renderer) -> None:
    desk.write([*chats(range(60)), chat("Why? " * 200, "So.")])
    cared = desk.care(lambda job, labels: talk)
    assert [problem for _, problem in cared.quarantine] == [
        "has no supervised token within max_length 96; shorten it, or raise training.max_length"
    ]
    assert cared.num_tokens > 10 * len(cared.train)


def test_a_row_on_which_the_template_does_not_end_costs_itself_alone(desk: Desk, talk: Renderer) -> None:
    renderer = Renderer(talk.tokenizer, 96, template=BOMB_TEMPLATE)
    renderer._made_template.append(ForeignTemplate(BOMB_TEMPLATE, {}, TemplateLimits(cpu_seconds=0.5)))
    desk.write([*chats(range(30)), chat(f"Now {BOMB}", "Boom."), *chats(range(30, 60))])
    cared = desk.care(lambda job, labels: renderer)
    assert (cared.hold, cared.care.num_read) == (None, 60)
    assert "did not end within" in cared.quarantine[0][1]
    desk.write(chats(range(60)))
    assert desk.care(lambda job, labels: renderer).care.num_read == 60


def test_a_base_can_be_written_whose_template_bombs(tmp_path: Path, test_data: Path) -> None:
    write_base_with_bomb(test_data / "bases/talk-5m", tmp_path / "bomb")
    assert load_tokenizer(tmp_path / "bomb").chat_template == BOMB_TEMPLATE


def test_a_base_whose_template_is_none_holds_its_customers(desk: Desk, talk: Renderer) -> None:
    desk.write(chats(range(60)))
    cared = desk.care(lambda job, labels: Renderer(talk.tokenizer, 96, template="{{ messages"))
    assert cared.hold is not None
    assert cared.hold.reason == "not_rendered"


def test_drift_tells_another_customer_from_the_same_one(desk: Desk, test_data: Path) -> None:
    drifts = {}
    sets = test_data / "sets/snips/customers"
    halves = (sets / "get-weather/train.jsonl").read_text().splitlines()
    other = (sets / "play-music/train.jsonl").read_text().splitlines()
    (desk.folder / "train.jsonl").write_text("\n".join(halves[:300]))
    desk.train(desk.care())
    for name, lines in (("same", halves[:300]), ("half", halves[300:600]), ("other", other[:300])):
        (desk.folder / "train.jsonl").write_text("\n".join(lines))
        drifts[name] = desk.care().care
    assert drifts["same"].drift == 0.0
    assert 0.0 < (drifts["half"].drift or 0.0) < 0.2 < 0.3 < (drifts["other"].drift or 0.0)
    assert "moved away" in drifts["other"].notes[-1]
    assert not drifts["half"].notes


def test_drift_of_labels_is_seen(desk: Desk) -> None:
    desk.write(labelled(["spam", "ham"] * 50))
    desk.train(desk.care(task_type="SEQ_CLS"))
    desk.write(labelled(["ham"] * 97 + ["spam"] * 3))
    assert (desk.care(task_type="SEQ_CLS").care.drift or 0.0) > 0.3


def test_a_source_in_a_bucket_is_read_as_a_folder_is(desk: Desk, s3_bucket: str) -> None:
    desk.write(chats(range(60)))
    local = desk.care()
    open_store(s3_bucket).put("acme/train.jsonl", (desk.folder / "train.jsonl").read_bytes())
    remote = desk.care(data={"train": f"{s3_bucket}/acme/"})
    assert (remote.digest, bodies(remote.train)) == (local.digest, bodies(local.train))
    missing = desk.care(data={"train": f"{s3_bucket}/globex/"})
    assert missing.hold is not None
    assert missing.hold.reason == "unreadable"


def test_a_store_that_does_not_answer_is_not_the_customers_fault(desk: Desk) -> None:
    def away(uri: str) -> Storage:
        raise ServiceUnavailable("the store does not answer.")

    with pytest.raises(ServiceUnavailable):
        look_after(desk.customer(data={"train": "s3://bucket/acme/"}), None, None, list, away)


def test_cared_rows_become_the_job_that_reading_them_gives(desk: Desk, test_data: Path, local_store: LocalStorage) -> None:
    desk.base = str(test_data / "bases/stories260k")
    desk.write(chats(range(60)))
    resolver = Resolver(local_store, desk.folder, desk.folder / "cache", lambda tenant, reference: ("", reference))
    customer = desk.customer(training={"max_length": 96, "max_steps": 2})
    cared = look_after(customer, resolver.renderer, None, list, open_store)
    job = resolver.resolve_rows(customer.job, cared.splits, is_rendered=True)
    desk.write([dict(row.body) for row in cared.train])
    desk.write([dict(row.body) for row in cared.holdout], "test.jsonl")
    read = resolver.resolve(customer.job)
    assert (job.job_id, job.train, job.test) == (read.job_id, read.train, read.test)


def test_resolving_given_rows_checks_them_and_remembers_none(desk: Desk, test_data: Path, local_store: LocalStorage) -> None:
    desk.base = str(test_data / "bases/stories260k")
    resolver = Resolver(local_store, desk.folder, desk.folder / "cache", lambda tenant, reference: ("", reference))
    spec = desk.customer(training={"max_length": 96}).job
    good = [Row(body, f"x:{number}") for number, body in enumerate(chats(range(30)))]
    cut = Row(chat("Why? " * 200, "So."), "x:99")
    assert resolver.resolve_rows(spec, Splits(good, None, None)).train.num_rows == 30
    with pytest.raises(BadInput, match=r"no supervised token within max_length 96 \(first: x:99\)"):
        resolver.resolve_rows(spec, Splits(good, None, [cut]))
    assert not resolver._data


def test_customers_may_be_looked_after_at_the_same_time(tmp_path: Path, healthy: list[str], talk: Renderer) -> None:
    desks = [Desk(tmp_path / str(number)) for number in range(8)]
    for number, desk in enumerate(desks):
        desk.folder.mkdir()
        (desk.folder / "train.jsonl").write_text("\n".join(healthy[20 * number :]))
    renderer = Renderer(talk.tokenizer, 96)

    def digest(desk: Desk) -> str:
        return desk.care(lambda job, labels: renderer.for_job(job.training.max_length, labels), min_rows=5).digest

    alone = [digest(desk) for desk in desks]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(digest, desks * 3)) == alone * 3
