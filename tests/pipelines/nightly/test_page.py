"""A night is told without a network, in numbers that add up, whatever its customers wrote."""

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from infra.records import decode_record, encode_record
from pipelines.nightly.figures import has_problems, quantile
from pipelines.nightly.page import page_html, report_json, summary_text, write_page
from pipelines.nightly.records import NightReport, NightSummary
from tests.pipelines.nightly.nights import HOSTILE, a_night, large_night, promoted, row

VOID = {"meta", "br", "input", "img", "link"}


class Page(HTMLParser):
    """Cells of tables by id, headings, drawings, scripts by type, and whatever would be loaded or run from elsewhere."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.headings: list[str] = []
        self.blocks: dict[str, str] = {}
        self.policy = ""
        self.outside: list[str] = []
        self.inline: list[str] = []
        self.num_drawings = 0
        self.tags: set[str] = set()
        self.text = ""
        self._open: list[str] = []
        self._table = ""
        self._block = ""
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        self.outside += [
            str(found[name]) for name in ("src", "href", "action") if name in found and not str(found[name]).startswith("#")
        ]
        self.inline += [name for name in found if name == "style" or name.startswith("on")]
        self.num_drawings += tag == "svg"
        if tag == "meta" and found.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(found["content"])
        if tag == "table":
            self._table = str(found["id"])
            self.tables[self._table] = []
        if tag == "tr":
            self.tables[self._table].append([])
        if tag in ("td", "th"):
            self.tables[self._table][-1].append("")
        if tag in ("script", "style"):
            self._block = str(found.get("type") or tag)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("script", "style"):
            self.blocks[self._block] = self.blocks.get(self._block, "") + data
            return
        self.text += data
        if {"td", "th"} & set(self._open):
            self.tables[self._table][-1][-1] += data
        if self._open and self._open[-1] == "h2":
            self.headings.append(data)


def test_the_page_says_who_ended_how_and_why() -> None:
    page = Page(page_html(a_night()))
    counts = {line[0]: line[1:] for line in page.tables["counts"][1:]}
    assert counts["promoted"] == ["2", ""]
    assert counts["skipped"] == ["2", "1 too_few_new_rows, 1 unchanged"]
    assert page.tables["held"][1] == [
        "umbrella.support", "collapsed", "12 rows, 97 % fewer than the 400 of last time.", "Look at its export.",
    ]  # fmt: skip
    assert page.tables["rejected"][1][2] == "eval/loss better by -0.1, asked is more than 0.005"
    assert [line[0] for line in page.tables["slowest"][1:]] == ["globex.support", "acme.support", "initech.support"]
    assert [line[:2] for line in page.tables["drift"][1:]] == [["umbrella.support", "0.600"], ["acme.support", "0.120"]]
    assert [line[0] for line in page.tables["nights"][1:3]] == ["2026-11-24", "2026-11-23"]
    assert page.headings[:5] == ["This night", "Failed", "Held", "Rejected by a gate", "All customers"]
    assert "MLflow did not answer from 01:10 to 01:25." in page.text
    assert "Finished in 1 h 30 min." in page.text


def test_the_table_of_customers_holds_every_row_with_its_figures() -> None:
    page = Page(page_html(a_night()))
    body = json.loads(page.blocks["application/json"])
    names = page.tables["table"][0]
    rows = {cells[0]: dict(zip(names, cells, strict=False)) for cells in body["rows"]}
    assert len(rows) == 7
    acme = rows["acme.support"]
    assert [acme[name] for name in ("rows", "new", "deleted", "challenger", "champion", "base")] == [200, 25, 2, 1.2, 1.4, 5.5]
    assert [acme[name] for name in ("gates", "generation", "tokens")] == ["passed", 4, 60_000]
    assert acme["gain"] == pytest.approx(0.2)
    assert rows["globex.support"]["gain"] == pytest.approx(3.5), "a first champion is held against the plain base"
    assert rows["initech.support"]["gates"] == "not better_than_champion"
    assert rows["initech.support"]["gain"] == pytest.approx(-0.1)
    assert rows["evil.support"]["challenger"] == "NaN"
    assert rows["hooli.support"]["seconds"] is None, "what an earlier night spent is not this night's"


def test_nothing_is_loaded_from_elsewhere_and_only_its_own_script_may_run() -> None:
    page = Page(page_html(a_night()))
    assert (page.outside, page.inline) == ([], [])
    for name, block in (("script-src", page.blocks["script"]), ("style-src", page.blocks["style"])):
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in page.policy
    assert page.policy.startswith("default-src 'none'")
    assert "unsafe" not in page.policy
    assert "@import" not in page.blocks["style"]
    assert "url(" not in page.blocks["style"]


def test_what_customers_wrote_is_shown_as_text() -> None:
    html = page_html(a_night())
    page = Page(html)
    assert "img" not in page.tags
    shown = HOSTILE.replace("\ud800", "\ufffd").replace("\x1b", "\ufffd").replace("\u202e", "\ufffd")
    assert page.tables["failed"][1][2] == f"The loss was NaN after {shown}"
    details = json.loads(page.blocks["application/json"])["rows"][-3][-1]
    assert details["bad rows"] == [f"train.jsonl:7 not JSON: {shown}", "train.jsonl:9 no answer"]
    html.encode("utf-8")


def test_a_hostile_fleet_name_stays_text() -> None:
    page = Page(page_html(dataclasses.replace(a_night(), fleet=HOSTILE, night=HOSTILE, timezone=HOSTILE)))
    assert "img" not in page.tags


def test_the_page_is_written_whole_and_over_an_older_one(tmp_path: Path) -> None:
    path = write_page(a_night(), tmp_path / "nights" / "page.html")
    first = path.read_text()
    assert write_page(dataclasses.replace(a_night(), fleet="other"), path) == path
    assert path.read_text() != first
    assert [one.name for one in path.parent.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    "rows", [(), (row("acme", "skipped", reason="unchanged"),), (promoted("acme", challenger=1.0, champion=1.0),)]
)
def test_nights_with_little_to_tell_have_a_page(rows: tuple) -> None:
    report = NightReport("prod", "2026-11-24", "UTC", 0.0, None, False, rows)
    page = Page(page_html(report))
    assert "Not finished" in page.text
    assert "The nights before" not in page.headings
    assert len(json.loads(page.blocks["application/json"])["rows"]) == len(rows)


def test_long_lists_are_cut_and_say_so() -> None:
    report = large_night(10_000)
    page = Page(page_html(report))
    assert len(page.tables["held"]) == 26
    assert f"{report.counts['held'] - 25} more are in the table of all customers." in page.text.replace(",", "")
    assert len(json.loads(page.blocks["application/json"])["rows"]) == 10_000
    assert page.num_drawings == 7


def test_an_endless_number_among_the_figures_does_not_hide_the_others() -> None:
    rows = (
        promoted("acme", challenger=float("inf"), champion=1.0, cost=float("nan")),
        promoted("globex", challenger=1.0, champion=1.5),
    )
    report = dataclasses.replace(a_night(), rows=rows)
    Page(page_html(report))
    assert report_json(report)["summary"]["mean_gain"] == 0.5
    assert report_json(report)["summary"]["cost"] == 0.0035


def test_the_json_has_counts_reasons_and_customers() -> None:
    body = report_json(a_night())
    assert body["counts"] == {"promoted": 2, "trained": 0, "rejected": 1, "held": 1, "failed": 1, "skipped": 2}
    assert body["reasons"]["skipped"] == {"unchanged": 1, "too_few_new_rows": 1}
    assert body["started"].startswith("2026-11-2")
    customers = {one["tenant"]: one for one in body["customers"]}
    acme = customers["acme"]
    assert (acme["status"], acme["num_new"], acme["num_deleted"], acme["adapter_id"]) == ("promoted", 25, 2, "a" * 32)
    assert customers["evil"]["challenger"] == "NaN"
    assert "signature" not in acme
    assert body["summary"]["num_tokens"] == 129_000, "what skipped customers carry over is not counted"
    assert body["summary"]["mean_gain"] == pytest.approx((0.2 + 3.5) / 2)


def test_the_json_can_be_kept_in_the_store_and_read_back_as_a_trend() -> None:
    body = report_json(a_night())
    kept = decode_record(encode_record("night-report/1", body), "night-report/1", "here")
    assert kept == body
    assert [NightSummary(**one).night for one in [*kept["trend"], kept["summary"]]][-2:] == ["2026-11-23", "2026-11-24"]


def test_the_text_names_who_needs_a_look() -> None:
    lines = summary_text(a_night()).splitlines()
    assert lines[0] == "Night 2026-11-24 of prod, 7 customers. Finished in 1 h 30 min."
    assert "      2 skipped (1 too_few_new_rows, 1 unchanged)" in lines
    assert "129,000 tokens trained on, 0.009 accelerator-hours" in lines
    assert lines[-1] == "held umbrella.support: 12 rows, 97 % fewer than the 400 of last time. Look at its export."
    assert "\x1b" not in "".join(lines)


def test_the_text_of_a_large_night_stays_short() -> None:
    text = summary_text(large_night(5_000))
    assert len(text.splitlines()) < 35
    assert re.search(r"\.\.\. and \d+ more held", text)


def test_problems_are_what_a_person_should_look_at() -> None:
    calm = dataclasses.replace(a_night(), remarks=(), rows=(promoted("acme", challenger=1.0, champion=1.1),))
    assert not has_problems(calm)
    assert has_problems(dataclasses.replace(calm, is_finished=False))
    assert has_problems(dataclasses.replace(calm, remarks=("the deadline came",)))
    assert has_problems(dataclasses.replace(calm, rows=(row("acme", "held"),)))


def test_quantiles_are_values_that_are_there() -> None:
    assert [quantile([3.0, 1.0, 2.0, 4.0], share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 2.0, 4.0, 4.0]
