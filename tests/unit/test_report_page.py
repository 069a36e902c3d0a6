"""The report page in a real browser, from disk, network off: plays, scrubs, filters, sorts, complains of nothing."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from answer_study import launch
from evaluated_runs import several_seeds
from evaluations import write_evaluation
from playwright.sync_api import sync_playwright

from rlvid.report.write import write_report


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_evaluation(tmp_path_factory.mktemp("browsed") / "ev")
    return write_report([folder], moving=2).folder / "index.html"


@pytest.fixture(scope="module")
def with_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one method and another method, with curves, costs and cards."""
    return write_report([several_seeds(tmp_path_factory.mktemp("runs"))], moving=2).folder / "index.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as player:
        try:
            found = launch(player)
        except ValueError as error:
            pytest.skip(str(error))
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Any]:
    """A function that opens the page; at the end, nothing may have been complained of or asked of the network."""
    complaints: list[str] = []
    contexts = []

    def open_page(width: int = 1280, path: Path = report, **options: Any) -> Any:
        context = browser.new_context(offline=True, viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)  # the machine may have other work
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
        page.on("request", lambda request: request.url.startswith("file:") or complaints.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def shown(page: Any) -> list[int]:
    """Numbers of the cases on show, in the order of the page."""
    return page.eval_on_selector_all("#list .case:not([hidden])", "cards => cards.map(c => Number(c.dataset.case))")


def frame(page: Any, card: str) -> int:
    return int(page.get_attribute(card, "data-frame"))


FIRST = '#list .case[data-case="0"]'


def test_it_plays_pauses_and_scrubs_all_models_together(opened: Any) -> None:
    page = opened()
    page.locator(FIRST).scroll_into_view_if_needed()
    page.wait_for_function("s => document.querySelector(s).dataset.frame > 1", arg=FIRST)
    page.click(f"{FIRST} .play")
    assert page.inner_text(f"{FIRST} .play") == "Play"
    stopped = frame(page, FIRST)
    page.wait_for_timeout(400)
    assert frame(page, FIRST) == stopped

    def pictures() -> list[bytes]:
        return [page.locator(f"{FIRST} canvas").nth(place).screenshot() for place in range(2)]

    page.locator(f"{FIRST} .scrub").fill("2")
    assert (frame(page, FIRST), page.inner_text(f"{FIRST} .frame")) == (2, "3 / 8")
    before = pictures()
    assert before[0] != before[1], "two models, two videos"
    page.locator(f"{FIRST} .scrub").press("ArrowRight")
    assert frame(page, FIRST) == 3
    assert page.get_attribute(f"{FIRST} .scrub", "aria-valuetext") == "frame 4 of 8"
    after = pictures()
    assert before[0] != after[0], "the base's picture has moved"
    assert before[1] != after[1], "the tuned model's picture has moved"
    page.locator(f"{FIRST} .play").press("Enter")
    page.wait_for_function("s => document.querySelector(s).dataset.frame != 3", arg=FIRST)
    page.click("#all")
    assert page.inner_text("#all") == "Play all"
    assert set(page.locator(".play").all_text_contents()) == {"Play"}


def test_it_filters_by_set_steps_and_words_and_says_so(opened: Any) -> None:
    page = opened()
    assert shown(page) == list(range(10))
    page.select_option("[name=set]", "scenes")
    assert shown(page) == [6, 7, 8, 9]
    page.select_option("[name=steps]", "50")
    assert shown(page) == [8, 9]
    page.fill("[name=text]", "SEA calm")
    assert shown(page) == [9]
    assert page.inner_text("#status") == "1 of 10 cases"
    page.fill("[name=text]", "nothing like it")
    assert shown(page) == []
    assert page.is_visible("#none")
    page.click("[type=reset]")
    page.wait_for_function("() => document.querySelectorAll('#list .case:not([hidden])').length === 10")
    assert page.is_hidden("#none")


def test_it_sorts_by_gain_and_loss_of_any_metric(opened: Any) -> None:
    page = opened()
    page.select_option("[name=order]", "loss")  # cases of odd number lose 0.05 in the held-out reward, others gain 0.1
    assert [number % 2 for number in shown(page)] == [1] * 5 + [0] * 5
    assert page.inner_text("#status").endswith("largest loss in Held-out reward first (InstructVideo over base)")
    page.select_option("[name=order]", "gain")
    assert [number % 2 for number in shown(page)] == [0] * 5 + [1] * 5
    assert page.locator(f"{FIRST} .value").all_text_contents() == ["0.400", "0.500 (+0.100)"]
    page.select_option("[name=metric]", label="Motion")
    assert page.locator(f"{FIRST} .value").all_text_contents() == ["0.700", "0.750 (+0.050)"]
    page.select_option("[name=order]", "")
    assert shown(page) == list(range(10))


def test_a_report_with_runs_and_seeds_shows_all_of_it(opened: Any, with_runs: Path) -> None:
    page = opened(path=with_runs)
    for picture in page.locator("img").all():
        picture.scroll_into_view_if_needed()
    page.wait_for_function("() => [...document.images].every((i) => i.complete && i.naturalWidth)")
    assert page.locator("img.drawing").count() >= 4
    assert page.locator("meter").count() >= 3
    page.click("text=Model card: use, limits >> nth=0")
    assert page.locator(".card .prose").first.is_visible()
    assert page.get_by_role("region", name="Table: Each against each, D = 20").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_boxes_choose_whose_videos_are_on_show(opened: Any, with_runs: Path) -> None:
    page = opened(path=with_runs)
    page.locator(FIRST).scroll_into_view_if_needed()

    def names() -> list[str]:
        found = page.locator(f"{FIRST} figure:not([hidden]) .name").all_text_contents()
        return [text.split()[-1] for text in found]

    assert names() == ["base", "iv-seed0", "other"], "of seeds, the first"
    boxes = page.get_by_role("group", name="Show")
    boxes.get_by_label("other").uncheck()
    boxes.get_by_label("iv-seed1").check()
    assert names() == ["base", "iv-seed0", "iv-seed1"]
    page.click(f"{FIRST} .play")
    late = page.locator(f"{FIRST} canvas >> visible=true").nth(2)
    for _ in range(100):  # it is loaded only now
        page.locator(f"{FIRST} .scrub").fill("1")
        before = late.screenshot()
        page.locator(f"{FIRST} .scrub").fill("5")
        if late.screenshot() != before:
            break
        page.wait_for_timeout(100)
    else:
        pytest.fail("a video that was chosen later does not move with the others")
    worst = page.locator(".pair .case").last
    assert worst.locator("figure:not([hidden])").count() == 2, "an extreme beside the base, whatever is chosen"


def test_it_can_be_read_by_keyboard_and_screen_reader(opened: Any) -> None:
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, canvas, img, meter, [role=region]")].filter(
             (e) => !(e.getAttribute("aria-label") || e.alt || e.textContent.trim() || (e.labels && e.labels.length)
           )).map((e) => e.outerHTML)"""
    )
    assert unnamed == []
    levels = page.eval_on_selector_all("h1, h2, h3, h4", "heads => heads.map(h => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    page.locator(f"{FIRST} .numbers summary").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(f"{FIRST} .numbers table")
    assert "Held-out reward" in page.inner_text(f"{FIRST} .numbers table")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_has_contrast_in_light_and_dark(opened: Any, scheme: str) -> None:
    page = opened(390, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    variables = ("--paper", "--sheet", "--ink", "--soft", "--link", "--up", "--down")
    colours = page.evaluate(
        "names => names.map(n => getComputedStyle(document.documentElement).getPropertyValue(n).trim())",
        list(variables),
    )
    paper, sheet, *inks = (luminance(colour) for colour in colours)
    for ink in inks:
        for ground in (paper, sheet):
            assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) >= 4.5


def luminance(colour: str) -> float:
    """Of WCAG, for #rrggbb."""
    assert re.fullmatch(r"#[0-9a-fA-F]{6}", colour)
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_someone_who_wants_less_motion_is_not_given_any(opened: Any) -> None:
    page = opened(reduced_motion="reduce")
    page.locator(FIRST).scroll_into_view_if_needed()
    page.wait_for_function("s => document.querySelector(s).dataset.frame === '0'", arg=FIRST)
    page.wait_for_timeout(500)
    assert frame(page, FIRST) == 0
    assert page.inner_text("#all") == "Play all"
