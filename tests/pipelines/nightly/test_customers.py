"""Who the customers of a fleet are: listed, discovered, from tables, and what is laid over what."""

import dataclasses
import os
import time
from pathlib import Path

import pytest

from infra.errors import BadInput, LorafleetError
from infra.local_storage import LocalStorage
from infra.s3 import S3Storage
from infra.stores import open_store
from pipelines.nightly.customers import customers_of, printable, signature_of, signatures_of
from pipelines.nightly.signatures import signatures_of_neighbours
from pipelines.nightly.spec import load_fleet
from pipelines.nightly.state_key import recipe_digest
from tests.pipelines.nightly.fleets import by_name, found_in, only_customer, write_fleet, write_rows


def test_a_customers_job_is_the_template_with_its_tenant_data_and_overrides(tmp_path: Path) -> None:
    customer = only_customer(tmp_path, "tenant: acme, data: ./acme, priority: 90, set: {training.num_train_epochs: 3}")
    job = customer.job
    assert (job.tenant, job.task, job.data.train, job.resources.priority) == ("acme", "support", "./acme", 90)
    assert (job.training.num_train_epochs, job.training.per_device_train_batch_size) == (3, 4)
    assert job.data.format == "messages"
    assert job.base_model.name_or_path == str(tmp_path / "base")
    assert customer.gates == tmp_path / "gates.yaml"


def test_other_rows_of_the_templates_own_tenant_never_reach_a_customer(tmp_path: Path) -> None:
    data = only_customer(tmp_path).job.data
    assert (data.validation, data.test) == (None, None)


def test_a_customer_without_overrides_trains_by_the_recipe_of_its_fleet(tmp_path: Path) -> None:
    write_rows(tmp_path / "d" / "a" / "train.jsonl")
    write_rows(tmp_path / "d" / "b" / "train.jsonl")
    text = "customers: [{discover: 'd/{tenant}/'}, {tenant: b, set: {peft.r: 4}}]\n"
    _, customers, _ = found_in(write_fleet(tmp_path, text))
    plain, other = customers
    assert recipe_digest(plain.job) == recipe_digest(only_customer(tmp_path).job)
    assert recipe_digest(plain.job) != recipe_digest(other.job)


def test_customers_are_discovered_by_a_pattern_with_the_signatures_of_their_files(tmp_path: Path) -> None:
    for name in ("acme", "globex", "test-one"):
        write_rows(tmp_path / "data" / name / "train.jsonl")
    (tmp_path / "data" / "acme" / "notes.txt").write_text("no rows")
    (tmp_path / "data" / "README.md").write_text("no customer")
    path = write_fleet(tmp_path, "customers: [{discover: 'data/{tenant}/', exclude: ['test-*'], priority: 7}]\n")
    _, customers, refused = found_in(path)
    assert [(one.name, one.priority) for one in customers] == [("acme.support", 7), ("globex.support", 7)]
    assert refused == []
    for customer in customers:
        looked = dataclasses.replace(customer, signature=None)
        assert customer.signature is not None
        assert [name for name, _, _ in customer.signature.files] == ["train.jsonl"]
        assert signature_of(looked, open_store) == customer.signature


def test_single_files_and_deeper_folders_are_discovered_too(tmp_path: Path) -> None:
    write_rows(tmp_path / "flat" / "of-acme.jsonl")
    write_rows(tmp_path / "deep" / "globex" / "support" / "train.jsonl")
    (tmp_path / "deep" / "initech").mkdir()
    text = "customers: [{discover: 'flat/of-{tenant}.jsonl'}, {discover: 'deep/{tenant}/support/'}]\n"
    _, customers, refused = found_in(write_fleet(tmp_path, text))
    assert [one.source for one in customers] == ["flat/of-acme.jsonl", "deep/globex/support/"]
    assert refused == []


@pytest.mark.parametrize("remote", [False, True])
def test_hostile_names_are_one_failed_row_each(tmp_path: Path, s3_bucket: str, remote: bool) -> None:
    names = ["acme", "UPPER", "a b", "..evil", "<script>", "x" * 70, "ümlaut", "bell\x07"]
    names += [] if remote else ["new\nline"]  # moto has no such key
    for name in names:
        path = write_rows(tmp_path / "data" / name / "train.jsonl")
        if remote:
            _put(s3_bucket, f"customers/{name}/train.jsonl", path)
    pattern = f"{s3_bucket}/customers/{{tenant}}/" if remote else "data/{tenant}/"
    _, customers, refused = found_in(write_fleet(tmp_path, f"customers: [{{discover: '{pattern}'}}]\n"))
    assert [one.tenant for one in customers] == ["acme"]
    assert sorted(row.tenant for row in refused) == sorted(printable(name) for name in names[1:])
    for row in refused:
        assert (row.status, row.reason, row.task) == ("failed", "bad_customer", "support")
        assert "is not a name" in row.sentence
        assert (row.tenant + row.sentence + row.next_step).isprintable()


def test_a_name_that_is_not_utf8_is_one_failed_row_that_can_be_written(tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "acme" / "train.jsonl")
    os.makedirs(os.fsencode(tmp_path) + b"/data/\xff\xfe")
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/data/\xff\xfe")) / "train.jsonl").write_text("")
    _, customers, [row] = found_in(write_fleet(tmp_path, "customers: [{discover: 'data/{tenant}/'}]\n"))
    assert [one.tenant for one in customers] == ["acme"]
    assert row.tenant.encode()


def test_a_discovered_customer_without_rows_is_a_failed_row(tmp_path: Path) -> None:
    (tmp_path / "data" / "acme").mkdir(parents=True)
    _, customers, [row] = found_in(write_fleet(tmp_path, "customers: [{discover: 'data/{tenant}/'}]\n"))
    assert customers == []
    assert (row.tenant, row.status, row.reason) == ("acme", "failed", "no_data")


def test_what_is_said_of_a_customer_is_laid_over_what_is_discovered(tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "acme" / "train.jsonl")
    write_rows(tmp_path / "data" / "globex" / "train.jsonl")
    text = """\
customers:
  - {discover: "data/{tenant}/", min_new_rows: 5, set: {training.max_steps: 9, peft.r: 4}}
  - {tenant: acme, priority: 80, set: {peft.r: 8}}
  - {tenant: globex, data: ./elsewhere}
  - {tenant: hooli}
"""
    _, customers, [row] = found_in(write_fleet(tmp_path, text))
    acme, globex = customers
    assert (acme.source, acme.min_new_rows, acme.priority) == ("data/acme/", 5, 80)
    assert (acme.job.training.max_steps, acme.job.peft.r) == (9, 8)
    assert acme.signature is not None
    assert (globex.source, globex.signature, globex.min_new_rows) == ("./elsewhere", None, 5)
    assert (row.tenant, row.reason) == ("hooli", "no_data")


def test_customers_stand_in_a_table(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "customers.csv").write_text(
        "tenant,data,priority,task,pin,set.training.num_train_epochs,set.peft.target_modules\n"
        "acme,./acme,90,,,4,attention\n"
        'globex,s3://bucket/globex/,,returns,abcdef,,"[q_proj, v_proj]"\n'
    )
    text = "customers: [{csv: tables/customers.csv, priority: 10}]\n"
    _, customers, refused = found_in(write_fleet(tmp_path, text))
    acme, globex = customers
    assert refused == []
    assert (acme.name, acme.priority, acme.pin, acme.folder) == ("acme.support", 90, None, tmp_path / "tables")
    assert (acme.job.training.num_train_epochs, acme.job.peft.target_modules) == (4, "attention")
    assert (globex.name, globex.priority, globex.pin) == ("globex.returns", 10, "abcdef")
    assert globex.job.peft.target_modules == ["q_proj", "v_proj"]


def test_a_bad_line_of_a_table_is_one_failed_row(tmp_path: Path) -> None:
    lines = ["tenant,data,priority,set.peft.r", "good,./a,,", "Bad,./a,,", "loud,./a,1000,", "wide,./a,,-1", "short,./a"]
    lines += [",./a,,", "yaml,./a,,{", "good-too,./a,100,2", "nowhere,,,"]
    (tmp_path / "customers.csv").write_text("\n".join(lines))
    _, customers, refused = found_in(write_fleet(tmp_path, "customers: [{csv: customers.csv}]\n"))
    assert [one.tenant for one in customers] == ["good", "good-too"]
    told = {row.tenant: row for row in refused}
    assert set(told) == {"Bad", "loud", "wide", "customers.csv:6", "customers.csv:7", "yaml", "nowhere"}
    assert {row.status for row in refused} == {"failed"}
    assert "customers.csv:4: the priority '1000' should be a whole number" in told["loud"].sentence
    assert "'peft.r'" in told["wide"].sentence
    assert "names no tenant" in told["customers.csv:7"].sentence
    assert told["nowhere"].reason == "no_data"


def test_a_customer_that_a_table_names_twice_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "customers.csv").write_text("tenant,data\nacme,./a\nglobex,./b\nacme,./c\n")
    _, customers, [row] = found_in(write_fleet(tmp_path, "customers: [{csv: customers.csv}]\n"))
    assert [one.tenant for one in customers] == ["globex"]
    assert (row.tenant, row.reason) == ("acme", "bad_customer")
    assert "stands in customers.csv:2 as well" in row.sentence


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (None, "customers.csv does not exist"),
        ("tenant,date\n", "has no column 'data'"),
        ("tenant,data,prioriti\n", "unknown column 'prioriti'. Did you mean 'priority'?"),
        ("tenant,data,tenant\n", "twice"),
    ],
)
def test_a_table_that_is_none_is_a_mistake_of_the_fleet(tmp_path: Path, table: str | None, told: str) -> None:
    if table is not None:
        (tmp_path / "customers.csv").write_text(table)
    with pytest.raises(BadInput, match=told.replace("?", r"\?")):
        found_in(write_fleet(tmp_path, "customers: [{csv: customers.csv}]\n"))


def test_a_pattern_whose_folder_is_missing_is_a_mistake_of_the_fleet(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="there is no folder"):
        found_in(write_fleet(tmp_path, "customers: [{discover: 'dtaa/{tenant}/'}]\n"))


def test_a_canary_that_is_no_customer_is_told(tmp_path: Path) -> None:
    write_rows(tmp_path / "acme" / "train.jsonl")
    text = "customers: [{tenant: acme, data: ./acme}]\nlimits: {canary: [acme, acmee]}\n"
    _, [customer], [row] = found_in(write_fleet(tmp_path, text))
    assert customer.is_canary
    assert (row.tenant, row.status, row.reason) == ("acmee", "failed", "unknown_canary")


def test_a_recipe_that_is_not_there_fails_its_customer_alone(tmp_path: Path) -> None:
    text = "customers: [{tenant: a, data: ./a, recipe: acme/none}, {tenant: b, data: ./b}, {tenant: c, data: ./c, recipe: x}]\n"
    _, [customer], refused = found_in(write_fleet(tmp_path, text))
    assert customer.tenant == "b"
    assert ["There is no sweep 'none' of the tenant 'acme'" in refused[0].sentence, "names no sweep" in refused[1].sentence]
    with pytest.raises(BadInput, match="There is no sweep"):
        found_in(write_fleet(tmp_path, "defaults: {recipe: acme/none}\ncustomers: [{tenant: a, data: ./a}]\n"))


def test_a_signature_moves_with_the_files_and_only_with_them(tmp_path: Path) -> None:
    customer = only_customer(tmp_path)
    file = write_rows(tmp_path / "acme" / "train.jsonl", word="hello")
    first = signature_of(customer, open_store)
    (tmp_path / "acme" / "notes.txt").write_text("not rows")
    assert signature_of(customer, open_store) == first
    before = file.stat()
    time.sleep(0.02)  # the kernel's clock for files ticks in steps of milliseconds
    write_rows(file, word="howdy")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = signature_of(customer, open_store)
    assert file.stat().st_size == before.st_size
    assert second != first
    write_rows(tmp_path / "acme" / "valid.jsonl")
    assert signature_of(customer, open_store) != second


def test_signatures_of_globs_and_files_cover_what_a_job_names(tmp_path: Path) -> None:
    for name in ("a/one.jsonl", "a/two.jsonl", "valid.jsonl"):
        write_rows(tmp_path / name)
    customer = only_customer(tmp_path, "tenant: acme, data: 'a/*.jsonl', set: {data.validation: valid.jsonl}")
    files = [name for name, _, _ in signature_of(customer, open_store).files]
    assert files == ["a/one.jsonl", "a/two.jsonl", "validation:valid.jsonl"]


def test_discovery_on_s3_is_one_listing_that_tells_all_signatures(tmp_path: Path, s3_bucket: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    for tenant in ("acme", "globex"):
        for name in ("train.jsonl", "valid.jsonl", "old/2020.jsonl", "notes.txt"):
            _put(s3_bucket, f"customers/{tenant}/{name}", path)
    fleet = load_fleet(write_fleet(tmp_path, f"customers: [{{discover: '{s3_bucket}/customers/{{tenant}}/'}}]\n"))
    asked: list[str] = []

    def open_counted(uri: str) -> S3Storage:
        asked.append(uri)
        return S3Storage(uri)

    customers, refused = customers_of(fleet, open_counted, LocalStorage(tmp_path / "store"))
    assert (refused, asked) == ([], [s3_bucket])
    known = signatures_of(customers, open_counted)
    assert asked == [s3_bucket]
    looked = signatures_of([dataclasses.replace(one, signature=None) for one in customers], open_counted)
    assert looked == known
    assert asked == [s3_bucket] * 2
    first = known[0]
    assert not isinstance(first, LorafleetError)
    assert [name for name, _, _ in first.files] == ["train.jsonl", "valid.jsonl"]


def test_neighbours_on_s3_are_listed_together_unless_too_much_lies_beside_them(
    tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    for key in ("a/train.jsonl", "b/train.jsonl", "b/valid.jsonl", "b/old/train.jsonl", "c/notes.txt", "d/train.jsonl"):
        _put(s3_bucket, f"customers/{key}", path)
    sources = [f"{s3_bucket}/customers/{name}" for name in ("a", "b/", "c", "missing")]
    text = "".join(f"  - {{tenant: t{n}, data: '{source}'}}\n" for n, source in enumerate(sources))
    _, customers, _ = found_in(write_fleet(tmp_path, f"customers:\n{text}"))
    together = signatures_of_neighbours(sources, open_store)
    assert set(together) == set(sources[:2])
    answers = signatures_of(customers, open_store)
    monkeypatch.setattr("pipelines.nightly.signatures.OBJECTS_PER_REQUEST", 1)
    assert signatures_of_neighbours(sources, open_store) == {}
    one_by_one = signatures_of(customers, open_store)
    assert one_by_one[:2] == answers[:2] == [together[source] for source in sources[:2]]
    assert [str(error) for error in one_by_one[2:]] == [str(error) for error in answers[2:]]
    assert "holds no file of rows" in str(answers[2])


def test_a_source_that_is_not_there_is_an_answer_beside_the_others(tmp_path: Path, s3_bucket: str) -> None:
    path = write_rows(tmp_path / "acme" / "train.jsonl")
    _put(s3_bucket, "one/rows.jsonl", path)
    text = f"""\
customers:
  - {{tenant: acme, data: ./acme}}
  - {{tenant: gone, data: ./gone}}
  - {{tenant: far, data: "{s3_bucket}/one/rows.jsonl"}}
  - {{tenant: far-glob, data: "{s3_bucket}/one/*.jsonl"}}
  - {{tenant: far-gone, data: "{s3_bucket}/two/"}}
"""
    _, customers, _ = found_in(write_fleet(tmp_path, text))
    answers = dict(zip(by_name(customers), signatures_of(customers, open_store), strict=True))
    errors = {name: str(answer) for name, answer in answers.items() if isinstance(answer, LorafleetError)}
    assert set(errors) == {"gone.support", "far-gone.support"}
    assert "./gone does not exist" in errors["gone.support"]
    assert answers["far.support"] == answers["far-glob.support"]


def _put(bucket: str, key: str, path: Path) -> None:
    """Put an object under any key, also one that our own stores would refuse."""
    store = S3Storage(bucket)
    store._connect().once.put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=path.read_bytes())
