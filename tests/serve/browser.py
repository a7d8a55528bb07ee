"""What the tests of the page share: where Chromium is, and what they do with the page."""

import shutil

import pytest
import torch
from playwright.sync_api import Page, expect

from tests.serve.conftest import Running, eventually

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
PROMPT = "Song 5: the 5 birds"
expect.set_options(timeout=60_000)


def tokens(page: Page):
    return page.locator("#text [role=option]")


def text_of(page: Page) -> str:
    return page.evaluate("state.tokens.map((token) => token.text).join('')")


def write(page: Page, served: Running, prompt: str = PROMPT) -> list[int]:
    """Type a prompt and wait until it is shown. Returns its tokens."""
    ids = served.tokenizer.encode_prompt(prompt)
    page.fill("#prompt", prompt)
    expect(tokens(page)).to_have_count(len(ids))
    eventually_js(page, f"state.tokens.map(({{ id }}) => id).join() === '{','.join(map(str, ids))}'")
    return ids


def eventually_js(page: Page, condition: str) -> None:
    eventually(lambda: page.evaluate(condition))


def slide(page: Page, name: str, value: float) -> None:
    page.locator(f"#{name}").fill(str(value))


def next_logits(served: Running, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return served.model(torch.tensor([ids]))[0].float()
