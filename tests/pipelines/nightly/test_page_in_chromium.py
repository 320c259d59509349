"""The page of a night in a real browser: sorted, searched, opened, printed, without a network and without the mouse."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from pipelines.nightly.page import write_page
from tests.conftest import REPOSITORY
from tests.contracts.storage_servers import missing, require
from tests.pipelines.nightly.nights import a_night, large_night

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ARTEFACTS = REPOSITORY / "tmp" / "artefacts"
"""What a person may look at after the tests; not under version control."""
NUM_CUSTOMERS = 10_000


class Opened:
    """A page that is open in a browser, and what went wrong in it."""

    def __init__(self, page: "Page", path: Path) -> None:
        self.page = page
        self.wrong: list[str] = []
        self.asked: list[str] = []
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("console", lambda message: self.wrong.append(message.text))
        page.on("request", lambda request: self.asked.append(request.url))
        page.goto(path.as_uri())

    def column(self, number: int) -> list[str]:
        """Return the texts of a column of the table of customers."""
        rows = "[...document.querySelectorAll('#table tbody tr:not(.detail)')]"
        return list(self.page.evaluate(f"{rows}.map(row => row.cells[{number}].textContent)"))

    def sort(self, name: str) -> None:
        """Click on a column's name."""
        self.page.get_by_role("columnheader").get_by_role("button", name=name, exact=True).click()

    def shown(self) -> str:
        """Return what the page says of how many customers it shows."""
        return self.page.locator("#shown").text_content() or ""


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Debian's Chromium, without a window; the test is skipped where there is none, and fails in CI."""
    require("playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        missing("chromium is not installed (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: "Browser", tmp_path: Path) -> Iterator[Opened]:
    """The page of a night with a customer of each status; the browser is offline, and nothing may go wrong in it."""
    yield from _open(browser, write_page(a_night(), tmp_path / "page.html"))


@pytest.fixture
def large(browser: "Browser", tmp_path: Path) -> Iterator[Opened]:
    """The page of a night of ten thousand customers."""
    yield from _open(browser, write_page(large_night(NUM_CUSTOMERS), tmp_path / "page.html"))


def _open(browser: "Browser", path: Path) -> Iterator[Opened]:
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900}, color_scheme="light")
    opened = Opened(context.new_page(), path)
    yield opened
    context.close()
    assert opened.wrong == []
    assert opened.asked == [path.as_uri()]


def test_every_column_sorts_both_ways(opened: Opened) -> None:
    names = opened.page.locator("#table thead button").all_text_contents()
    assert len(names) == 19
    for number, name in enumerate(names):
        opened.sort(name)
        up = opened.column(number)
        opened.sort(name)
        down = opened.column(number)
        filled = [text for text in up if text not in ("", "NaN")]
        assert [text for text in down if text not in ("", "NaN")] == filled[::-1] or len(set(filled)) < len(filled), name
        assert up[len(filled) :] == down[len(filled) :], "what is empty stands at the end, whichever way is sorted"


def test_numbers_are_sorted_as_numbers_and_empty_cells_stay_last(opened: Opened) -> None:
    opened.sort("rows")
    assert opened.column(3) == ["0", "0", "80", "150", "200", "200", "300"]
    opened.sort("challenger")
    opened.sort("challenger")
    assert opened.column(8) == ["2", "1.9", "1.2", "1", "NaN", "", ""]
    head = opened.page.locator("#table th[aria-sort=descending]")
    assert head.all_text_contents() == ["challenger"]


def test_a_search_finds_all_words_in_names_reasons_and_sentences(opened: Opened) -> None:
    opened.page.get_by_label("Search").fill("UMBRELLA 97")
    assert opened.column(0) == ["umbrella.support"]
    assert opened.shown() == "1 of 7 customers"
    opened.page.get_by_label("Search").fill("support nobody")
    assert opened.column(0) == []
    opened.page.get_by_label("Search").fill("canaries")
    assert opened.column(0) == ["acme.support"]


def test_a_count_shows_its_customers(opened: Opened) -> None:
    opened.page.locator("#counts").get_by_role("link", name="skipped").click()
    assert opened.column(1) == ["skipped", "skipped"]
    assert opened.page.get_by_label("Status").input_value() == "skipped"


def test_details_open_by_keyboard_and_close(opened: Opened) -> None:
    opener = opened.page.get_by_role("button", name="evil.support")
    opener.press("Enter")
    detail = opened.page.locator("tr.detail")
    told = detail.text_content() or ""
    assert "Look at its rows." in told
    assert "train.jsonl:9 no answer" in told
    assert opener.get_attribute("aria-expanded") == "true"
    opener.press("Enter")
    assert detail.count() == 0


def test_what_customers_wrote_does_not_run(opened: Opened) -> None:
    for opener in opened.page.locator("#table tbody button").all():
        opener.click()
    assert opened.page.title() == "Night 2026-11-24 of prod"
    assert opened.page.locator("img").count() == 0


def test_a_foreign_script_is_refused_by_the_policy(browser: "Browser", tmp_path: Path) -> None:
    path = write_page(a_night(), tmp_path / "page.html")
    path.write_text(path.read_text().replace("</body>", "<script>document.title = 'stolen'</script></body>"))
    page = browser.new_page()
    page.goto(path.as_uri())
    assert page.title() == "Night 2026-11-24 of prod"
    page.close()


def test_ten_thousand_customers_are_searched_and_shown_in_pieces(large: Opened) -> None:
    assert large.shown() == "10,000 customers, the first 200 shown"
    assert len(large.column(0)) == 200
    large.page.get_by_label("Search").fill("customer-09999")
    assert large.column(0) == ["customer-09999.support"]
    large.page.get_by_label("Search").fill("")
    large.sort("customer")
    assert large.column(0)[:2] == ["customer-00000.support", "customer-00001.support"]
    large.page.get_by_role("button", name="Show more").click()
    assert len(large.column(0)) >= 400


def test_no_text_is_wider_than_the_window_on_a_telephone(opened: Opened) -> None:
    opened.page.set_viewport_size({"width": 390, "height": 800})
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_in_light_and_dark(opened: Opened, scheme: Literal["light", "dark"]) -> None:
    opened.page.emulate_media(color_scheme=scheme)
    assert opened.page.evaluate(CONTRASTS) > 4.5


CONTRASTS = """() => {  // the least contrast of a word with what is behind it, as WCAG 2 computes it
  const light = text => {
    const linear = one => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = text.match(/[0-9.]+/g).map(one => linear(Number(one) / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let one = element; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (!colour.includes("rgba")) return light(colour);
    }
    return 1;
  };
  const all = document.querySelectorAll("h1, p, td, th, caption, figcaption, a, label, .status, summary, code");
  const words = [...all].filter(one => one.textContent.trim());
  return Math.min(...words.map(one => {
    const [low, high] = [light(getComputedStyle(one).color), behind(one)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  }));
}"""


def test_the_page_prints_and_its_picture_is_kept(large: Opened) -> None:
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    large.sort("gain")
    large.sort("gain")
    picture = ARTEFACTS / "night.png"
    large.page.screenshot(path=picture)
    assert picture.stat().st_size > 10_000
    large.page.get_by_label("Search").fill("failed")
    printed = large.page.pdf(path=ARTEFACTS / "night.pdf")
    assert printed.startswith(b"%PDF")
