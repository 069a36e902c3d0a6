"""The pages on a phone, by a keyboard, without JavaScript, and as a screen reader has them."""

import re
from collections.abc import Iterator

import pytest
from answer_study import Server, launch
from playwright.sync_api import Browser, Page, expect, sync_playwright
from watched import make_evaluation

PHONE = {"width": 390, "height": 844}
NAME = "Wolfeschlegelsteinhausenbergerdorff " + "W" * 24  # as long as a name may be


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as player:
        try:
            started = launch(player)
        except ValueError as error:
            pytest.skip(str(error))
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a study that everybody of this file answers, under a name of their own."""
    folder = make_evaluation(
        tmp_path_factory.mktemp("study") / "evaluation",
        sets={"in_domain": ["a square", "Donau" + "dampf" * 20 + "schiff", "a ball"]},
    )
    server = Server(str(folder))
    server.start()
    yield server.address
    server.kill()


def begin(page: Page, address: str, name: str) -> None:
    page.goto(address)
    page.get_by_label("Your name").fill(name)
    page.get_by_role("button", name="Begin").click()
    expect(page.get_by_role("heading")).to_have_text("Pair 1 of 3")
    page.wait_for_load_state("domcontentloaded")  # the script that hears keys has run


def choice(page: Page, question: str, side: str) -> None:
    """Clicks or taps an answer, as people see it."""
    radio = page.get_by_role("radio", name=side, exact=True)
    page.get_by_role("group", name=question).locator("label").filter(has=radio).click()


def answer(page: Page) -> None:
    """Answers the pair with the mouse, or a finger."""
    choice(page, "looks better", "Left")
    choice(page, "what this text says", "No difference")
    page.get_by_role("button", name="Save and go on").click()


def is_too_wide(page: Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"))


def test_a_phone_shows_everything_without_scrolling_sideways(browser: Browser, address: str) -> None:
    page = browser.new_page(viewport=PHONE, has_touch=True, is_mobile=True)  # type: ignore[arg-type]
    page.goto(address)
    assert not is_too_wide(page)
    begin(page, address, NAME)
    for done in range(3):
        expect(page.get_by_role("heading")).to_have_text(f"Pair {done + 1} of 3")
        assert not is_too_wide(page)
        for video in page.locator(".videos div").all():
            box = video.bounding_box()
            assert box
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= PHONE["width"]
        answer(page)
    expect(page.get_by_role("heading")).to_contain_text("Thank you")
    assert not is_too_wide(page)
    page.close()


def test_a_study_is_answered_without_javascript(browser: Browser, address: str) -> None:
    page = browser.new_page(java_script_enabled=False)
    begin(page, address, "without")
    for unusable in (page.locator("#still"), page.locator(".option")):
        expect(unusable).to_be_hidden()
    page.get_by_role("button", name="Save and go on").click()  # both questions need an answer
    expect(page.get_by_role("heading")).to_have_text("Pair 1 of 3")
    for done in range(3):
        expect(page.get_by_role("heading")).to_have_text(f"Pair {done + 1} of 3")
        answer(page)
    expect(page.get_by_role("heading")).to_have_text("Thank you, without")
    page.close()


def test_backspace_goes_back_from_the_second_question(browser: Browser, address: str) -> None:
    page = browser.new_page()
    begin(page, address, "back")
    marked = page.locator("fieldset.current")
    page.keyboard.press("1")
    expect(marked).to_have_id("alignment")
    page.keyboard.press("Backspace")
    expect(marked).to_have_id("quality")
    expect(page.locator("#quality input[value=left]")).to_be_focused()  # the answer that was given
    page.keyboard.press("3")
    page.keyboard.press("2")
    expect(page.locator("#quality input[value=right]")).to_be_checked()
    expect(page.locator("#alignment input[value=tie]")).to_be_checked()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading")).to_have_text("Pair 2 of 3")
    page.close()


def test_videos_are_held_still_and_move_again(browser: Browser, address: str) -> None:
    page = browser.new_page()
    begin(page, address, "still")
    images, hold = page.locator(".videos img"), page.get_by_role("button", name="Hold videos still")
    shown = "() => [...document.querySelectorAll('.videos img')].every(image => image.complete && image.naturalWidth)"
    for pressed in (True, False):
        hold.click()
        expect(hold).to_have_attribute("aria-pressed", str(pressed).lower())
        for image in images.all():
            assert str(image.get_attribute("src")).endswith("&still=true") == pressed
        page.wait_for_function(shown)
    expect(page.locator("#trouble")).to_be_hidden()
    page.close()


def test_every_control_has_a_name_and_every_question_its_text(browser: Browser, address: str) -> None:
    page = browser.new_page()
    page.goto(address)
    assert controls(page) == ['button "Begin, or go on"', 'textbox "Your name"']
    begin(page, address, "reader")
    sides = ['radio "Left"', 'radio "No difference"', 'radio "Right"']
    assert controls(page) == sorted(
        [
            'button "Save and go on"', 'button "Hold videos still"', 'img "The left video"',
            'img "The right video"', 'link "stop"', 'progressbar "Pairs answered"', *sides, *sides,
            'checkbox "Keys 1, 2, 3 answer, Backspace goes back"',
        ]
    )  # fmt: skip
    for question in ("Which video looks better?", "Which video shows better what this text says?"):
        expect(page.get_by_role("group", name=question, exact=True)).to_have_count(1)
    expect(page.locator("#alignment")).to_have_accessible_description(re.compile("“(a square|Donau.*|a ball)”"))
    page.goto(f"{address}judge")
    expect(page.get_by_role("alert")).to_contain_text("incomplete")
    assert controls(page) == ['link "To the first page"']
    page.close()


def controls(page: Page) -> list[str]:
    """Role and name of whatever a screen reader finds to use or to look at."""
    roles = "button|checkbox|combobox|img|link|progressbar|radio|slider|textbox"
    found = re.findall(rf"- ((?:{roles})(?: \"[^\"]*\")?)", page.locator("body").aria_snapshot())
    return sorted(found)
