"""The pictures of docs/12-seeing-attention.md, from a server that runs: python -m tests.serve.screenshots [ADDRESS]"""

import io
import json
import sys
from collections.abc import Callable
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from tests.conftest import ROOT
from tests.serve.browser import CHROMIUM, FLAGS, eventually_js

OPENING = """ROMEO:
But, soft! what light through yonder window breaks?
It is the east, and Juliet is the sun.

JULIET:
"""
SPEECH = """Arise, fair sun, and kill the envious moon,
Who is already sick and pale with grief,
That thou her maid art far more fair than she:
Be not her maid, since she is envious;
Her vestal livery is but sick and green
And none but fools do wear it; cast it off.
It is my lady, O, it is my love!
O, that she knew she were!
She speaks yet she says nothing: what of that?
Her eye discourses; I will answer it.
"""


def visit(browser: Browser, address: str, **options: Any) -> Page:
    """The playground in a new page, whose requests all have the same seed."""

    def seeded(route):
        route.continue_(post_data=json.dumps(json.loads(route.request.post_data) | {"seed": 4}))

    page = browser.new_page(**{"viewport": {"width": 1280, "height": 1000}} | options)
    page.route("**/v1/completions", seeded)
    page.goto(address)
    eventually_js(page, "state.next !== null")
    page.locator("#temperature").fill("0.7")
    return page


def write(page: Page, prompt: str, tokens: int = 0) -> None:
    """Type a prompt, and let the model continue it."""
    page.fill("#prompt", prompt)
    eventually_js(page, f"state.tokens.map(({{ text }}) => text).join('') === {json.dumps(prompt)}")
    if tokens:
        page.fill("#length", str(tokens))
        page.click("#generate")
        eventually_js(page, f"state.generating === null && state.tokens.at(-1).generated && {tokens} > 0")


def save(page: Page, name: str, whole: bool = True) -> None:
    """Save the page, or what is visible of it, as a picture of docs/."""
    page.wait_for_timeout(500)  # for transitions
    path = ROOT / "docs" / f"12-playground-{name}.png"
    picture = Image.open(io.BytesIO(page.screenshot(full_page=whole))).convert("RGB")
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.name} {path.stat().st_size / 1024:.0f} KiB")


def light(browser: Browser, address: str) -> None:
    page = visit(browser, address)
    write(page, OPENING, 90)
    page.evaluate("maps.choose(3, 3); view.select(89)")
    save(page, "light")


def dark(browser: Browser, address: str) -> None:
    page = visit(browser, address, color_scheme="dark", viewport={"width": 1280, "height": 1600})
    write(page, "ROMEO:\nO Juliet, I love thee, and thou lovest me.\n\nJULIET:\nO Romeo, I")
    page.evaluate("maps.choose(2, 1)")  # the second line break before a name attends to the other name
    margin, cell = page.evaluate("[maps.margin, maps.cell]")
    page.locator("#map").hover(position={"x": margin + 0.5 * cell, "y": 18.5 * cell})
    save(page, "dark")


def narrow(browser: Browser, address: str) -> None:
    page = visit(browser, address, viewport={"width": 360, "height": 1240}, device_scale_factor=2)
    write(page, "ROMEO:\nO Juliet, ", 24)
    page.evaluate("maps.choose(3, 3); view.select(20)")
    save(page, "narrow", whole=False)


def long(browser: Browser, address: str) -> None:
    page = visit(browser, address)
    write(page, OPENING.replace("\nJULIET:\n", "") + SPEECH + "\nJULIET:\n", 120)
    breaks = "state.tokens.findLastIndex(({ text }, at, all) => text === '\\n' && all[at - 1].text === '\\n')"
    page.evaluate(f"maps.choose(2, 1); view.select({breaks})")
    save(page, "long")


def error(browser: Browser, address: str) -> None:
    page = visit(browser, address)
    write(page, OPENING)
    page.route("**/v1/completions", lambda route: route.abort())  # as if the server were gone
    page.click("#generate")
    page.get_by_role("alert").wait_for()
    save(page, "error", whole=False)


PICTURES: tuple[Callable[[Browser, str], None], ...] = (light, dark, narrow, long, error)

if __name__ == "__main__":
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        for picture in PICTURES:
            picture(chromium, sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
