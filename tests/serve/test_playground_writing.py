"""The page in a real Chromium while a text is written: streaming, stopping, continuing, long texts."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from sample import load
from serve import playground
from tests.serve.browser import PROMPT, eventually_js, needs_chromium, slide, text_of, tokens, write
from tests.serve.conftest import Running, eventually, running

pytestmark = needs_chromium


@pytest.fixture
def stepped(songs) -> Iterator[Running]:
    """A server whose steps are held back."""
    with running(*songs, max_sequences=1) as served:
        served.hold()
        yield served


def test_tokens_are_shown_as_they_come(visit, stepped):
    served = stepped
    page = visit(served)
    given = len(write(page, served))
    slide(page, "temperature", 0)
    page.fill("#length", "9")
    page.press("#prompt", "Control+Enter")
    expect(page.locator("#stop")).to_be_visible()
    for step in (1, 2, 5):
        served.go(step - (tokens(page).count() - given))
        expect(tokens(page)).to_have_count(given + step)
        expect(page.locator("#status")).to_have_text(f"{step} tokens …")
    assert page.evaluate("state.tokens.at(-1).rivals.length") == 6
    served.go()
    expect(page.locator("#stop")).to_be_hidden()
    assert text_of(page) == PROMPT + served.text(PROMPT, 9)
    assert page.locator("#status").inner_text() == "9 tokens"
    assert page.evaluate("maps.size") == given + 9
    page.click("#continue")
    expect(tokens(page)).to_have_count(given + 18)
    expect(page.locator("#stop")).to_be_hidden()
    assert text_of(page) == PROMPT + served.text(PROMPT, 18)


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_stop_keeps_what_has_come(visit, stepped, how):
    served = stepped
    page = visit(served)
    given = len(write(page, served))
    slide(page, "temperature", 0)
    page.click("#generate")
    expect(page.locator("#stop")).to_be_focused()
    served.go(2)
    expect(tokens(page)).to_have_count(given + 2)
    page.keyboard.press("Escape") if how == "Escape" else page.click("#stop")
    eventually(lambda: not served.scheduler.generations)
    served.go()
    expect(page.locator("#status")).to_have_text("stopped after 2 tokens")
    expect(page.locator("#generate")).to_be_enabled()
    assert text_of(page) == PROMPT + served.text(PROMPT, 2)
    assert page.evaluate("maps.size") == given + 2
    eventually(served.idle)


def test_a_text_beyond_the_context_keeps_its_beginning(visit, endless):
    with running(*load(endless), max_sequences=1) as served:
        page = visit(served)
        write(page, served, "a" * 60)
        slide(page, "temperature", 0)  # the likeliest token never ends a text
        page.fill("#length", "20")
        page.click("#generate")
        expect(tokens(page)).to_have_count(80)
        expect(page.locator("#stop")).to_be_hidden()
        assert page.evaluate("[state.shown, maps.size]") == [16, 64]
        assert page.locator("#text .outside").count() == 16
        tokens(page).nth(3).click()
        assert page.locator(".attended").is_hidden()
        tokens(page).nth(20).click()
        assert page.locator(".attended li").count() == 4


@pytest.fixture
def four(monkeypatch) -> None:
    """Four tokens are inspected at once, of a model with 2 layers of 2 heads."""
    monkeypatch.setattr(playground, "MAP_BYTES", 4 * 4 * 5 // 2)


def test_a_text_that_is_too_long_for_maps_is_generated_from(visit, served, four):
    page = visit(served)
    slide(page, "temperature", 0)
    given = len(write(page, served))
    assert page.evaluate("[state.shown, maps.size, maps.tokens.length]") == [given - 4, 4, 4]
    page.fill("#length", "3")
    page.click("#generate")
    for count in (3, 6):
        expect(tokens(page)).to_have_count(given + count)
        expect(page.locator("#stop")).to_be_hidden()
        assert page.evaluate("[state.shown, maps.size]") == [given + count - 4, 4]
        page.click("#continue")
    expect(tokens(page)).to_have_count(given + 9)
    assert text_of(page) == PROMPT + served.text(PROMPT, 9)
    assert page.evaluate("state.tokens.map((token) => token.logprob !== undefined)") == [
        at > given - 4 for at in range(given + 9)
    ]
    tokens(page).nth(1).click()
    assert page.locator("#token h2").inner_text().endswith("has no probability here")
    assert page.locator("#text .outside").count() == given + 9 - 4


def test_a_chat_that_is_too_long_for_maps_goes_on(visit, chat_runs, four):
    with running(*load(chat_runs / "assistant"), "assistant", max_sequences=1) as served:
        page = visit(served)
        page.click("#tab-chat")
        slide(page, "temperature", 0)
        page.fill("#length", "8")
        for turn, said in enumerate(("what is 3 plus one?", "and two more?"), 1):
            page.fill("#prompt", said)
            page.press("#prompt", "Enter")
            eventually_js(page, f"state.messages.length === {2 * turn} && !state.generating")
            assert page.evaluate("maps.size") == 4
        assert page.locator("#problem").is_hidden()


def test_continue_takes_what_was_typed_the_moment_before(visit, served):
    """Before the pause after which a prompt is inspected has passed."""
    page = visit(served)
    slide(page, "temperature", 0)
    write(page, served)
    page.fill("#length", "4")
    page.evaluate("$('prompt').value = 'Song 7:'; $('prompt').dispatchEvent(new Event('input')); $('continue').click()")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator("#stop")).to_be_hidden()
    page.wait_for_timeout(200)  # nothing comes later
    assert text_of(page) == "Song 7:" + served.text("Song 7:", 4)


def test_continue_waits_for_what_is_being_inspected(visit, served):
    page = visit(served)
    slide(page, "temperature", 0)
    ids = write(page, served)
    page.fill("#length", "4")
    held = []
    page.route("**/playground/inspect", lambda route: held.append(route))
    tokens(page).nth(3).click()
    page.locator("#token > .bars li:not(.chosen) button").first.click()
    page.click("#continue")
    expect(page.locator("#stop")).to_be_visible()
    assert len(held) == 1 and not served.scheduler.generations
    held.pop().continue_()
    page.unroute("**/playground/inspect")
    expect(tokens(page)).to_have_count(4 + 4)
    expect(page.locator("#stop")).to_be_hidden()
    now = page.evaluate("state.tokens.map(({ id }) => id)")
    assert now[:3] == ids[:3] and now[3] != ids[3]
    assert text_of(page) == served.tokenizer.decode(now[:4]) + served.text(now[:4], 4)
