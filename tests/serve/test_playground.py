"""The page in a real Chromium: typing, inspecting, errors, a server that is gone."""

import dataclasses
import re

import pytest
import torch
from playwright.sync_api import Page, expect

from inference.attention_weights import attention_weights
from inference.sampling import SamplingParams
from sample import load
from tests.conftest import TINY, randomized
from tests.serve.browser import PROMPT, eventually_js, needs_chromium, next_logits, slide, tokens, write
from tests.serve.conftest import running

pytestmark = needs_chromium

# Typing -------------------------------------------------------------------------------------------------------------


def test_each_token_of_a_prompt_is_shaded_by_its_surprise(visit, served):
    page = visit(served)
    assert page.locator("h1").inner_text() == "heed songs"
    expect(tokens(page)).to_have_text(["<|endoftext|>"])  # an empty text begins a document
    assert page.locator("#maps").is_hidden() and page.locator("#no-maps").is_visible()
    page.locator("#prompt").press_sequentially(PROMPT)
    ids = write(page, served)
    assert page.locator("#maps").is_visible() and page.locator("#no-maps").is_hidden()
    assert "".join(tokens(page).all_text_contents()) == PROMPT
    weights = page.evaluate("view.nodes.map((node) => Number(node.style.getPropertyValue('--weight')))")
    bits = -next_logits(served, ids).double().log_softmax(1)[range(len(ids) - 1), ids[1:]] / torch.tensor(2.0).log()
    assert weights == pytest.approx([0, *(bits / 10).clamp(max=1).tolist()], abs=1e-3)
    assert len({page.evaluate(f"getComputedStyle(view.nodes[{at}]).backgroundColor") for at in range(4)}) > 1


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.8, 0, 1), (0, 0, 1), (1.5, 7, 1), (0.5, 0, 0.6), (1.2, 20, 0.35), (2, 1, 1)]
)
def test_sliders_show_the_distribution_that_is_sampled_from(visit, served, temperature, top_k, top_p):
    page = visit(served)
    ids = write(page, served)
    for name, value in (("temperature", temperature), ("top-k", top_k), ("top-p", top_p)):
        slide(page, name, value)
    logits = next_logits(served, ids)[-1:]
    sampling = SamplingParams(temperature or 1.0, top_k, top_p, greedy=temperature == 0)
    expected = sampling.probabilities(logits, torch.zeros_like(logits, dtype=torch.bool))[0].sort(descending=True)
    shown = page.evaluate("Array.from(distribution(state.next.logits, settings()))")
    kept = int((expected.values > 0).sum())
    assert len(shown) == kept and shown == pytest.approx(expected.values[:kept].tolist(), abs=1e-5)
    rows = page.locator("#next .bars li")
    for at in range(min(kept, 6)):
        p = float(rows.nth(at).locator(".value").inner_text().strip("<%")) / 100
        assert p == pytest.approx(shown[at], abs=0.0052)
        name = rows.nth(at).locator(".name").text_content()
        assert name.replace("\n", "") == served.tokenizer.decode([int(expected.indices[at])]).replace("\n", "")
    assert page.locator("#next .out").count() == max(0, 6 - kept)
    assert page.locator("#kept").inner_text().startswith("300 tokens" if kept == 300 else f"{kept} of 300 tokens")


def test_a_line_break_breaks_the_line_of_the_text_but_not_of_a_list(visit, served):
    page = visit(served)
    write(page, served, "Song\n")
    tokens(page).last.click()
    assert page.locator("#text .newline").text_content() == "\n"
    assert page.locator("#token h2 .newline").text_content() == ""


def test_markup_is_text(visit, served):
    page = visit(served)
    prompt = "<b onclick=alert(1)>&amp;</b>"
    write(page, served, prompt)
    assert "".join(tokens(page).all_text_contents()) == prompt
    assert page.locator("#text b").count() == 0


# Inspecting ---------------------------------------------------------------------------------------------------------


def test_arrows_show_rivals_and_what_a_token_attended_to(visit, served):
    page = visit(served)
    ids = write(page, served)
    weights, logprobs = attention_weights(served.model, torch.tensor(ids)), next_logits(served, ids).log_softmax(1)
    page.focus("#text")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    at = len(ids) - 2
    assert page.locator("#text [aria-selected=true]").get_attribute("id") == f"token-{at}"
    assert page.locator("#text").get_attribute("aria-activedescendant") == f"token-{at}"
    p = logprobs[at - 1].exp()
    shown = page.locator("#token > .bars")
    assert shown.locator(".value").first.inner_text() == f"{100 * float(p.max()):.0f}%"
    assert shown.locator(".chosen").count() == 1
    assert shown.locator("li").count() == 6 + (ids[at] not in p.topk(6).indices)
    for layer, head in ((0, 0), (1, 1)):
        page.click(f"#heads [aria-label='Layer {layer + 1}, head {head + 1}']")
        row = weights[layer][head, at, : at + 1]
        order = row.sort(descending=True).indices.tolist()
        names = [part.strip() for part in page.locator(".attended .name").all_text_contents()]
        assert names == [served.tokenizer.decode([ids[key]]).strip() for key in order[:4]]
        shade = page.evaluate("view.nodes.map((node) => Number(node.style.getPropertyValue('--weight')))")
        assert shade[: at + 1] == pytest.approx((row / row.max()).tolist(), abs=0.01)
        assert shade[at + 1 :] == [0] * (len(ids) - at - 1)
        assert f"layer {layer + 1}, head {head + 1}" in page.locator("#by").text_content()
    page.keyboard.press("Escape")
    assert page.locator("#text [aria-selected=true]").count() == 0


def test_a_token_that_is_pointed_at_comes_first(visit, served):
    page = visit(served)
    write(page, served)
    tokens(page).nth(4).click()
    tokens(page).nth(2).hover()
    assert page.locator("#text .current").get_attribute("id") == "token-2"
    assert page.locator("#token h2 span").first.text_content() == tokens(page).nth(2).text_content()
    page.mouse.move(1, 1)
    assert page.locator("#text .current").get_attribute("id") == "token-4"


def test_every_map_has_the_weights_of_its_head(visit, served):
    """The opacity of each pixel is the root of the weight in units of the head's largest one."""
    page = visit(served)
    ids = write(page, served)
    weights = attention_weights(served.model, torch.tensor(ids))
    assert page.locator("#heads button").count() == 2 * (2 + 1)  # with the means
    for layer, heads in enumerate(weights):
        for column, expected in enumerate([*heads, heads.mean(0)]):
            code = f"""(() => {{ const canvas = maps.buttons[{layer}][{column}].firstChild;
                const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
                return Array.from(data).filter((_, at) => at % 4 === 3); }})()"""
            roots = torch.tensor(page.evaluate(code)).view(len(ids), len(ids)) / 255
            assert float((roots - (expected / expected.max()).sqrt()).abs().max()) < 0.012
    page.focus("#heads [aria-pressed=true]")
    for key, name in (("ArrowDown", "layer 2, head 1"), ("ArrowRight", "layer 2, head 2"), ("ArrowRight", "mean")):
        page.keyboard.press(key)
        assert name in page.locator("#map-caption").inner_text().lower()
    assert page.evaluate("document.activeElement.ariaLabel") == "Layer 2, mean of all heads"


def test_the_enlarged_map_says_the_weight_that_is_pointed_at(visit, served):
    page = visit(served, viewport={"width": 1280, "height": 1600})
    ids = write(page, served)
    margin, cell = page.evaluate("[maps.margin, maps.cell]")
    query, key = len(ids) - 2, 1
    page.locator("#map").hover(position={"x": margin + (key + 0.5) * cell, "y": (query + 0.5) * cell})
    weight = float(attention_weights(served.model, torch.tensor(ids))[0][0, query, key])
    shown = float(re.search(r"([\d.]+)%$", page.locator("#map-caption").inner_text()).group(1)) / 100
    assert shown == pytest.approx(weight, abs=0.01)
    assert page.locator("#text .current").get_attribute("id") == f"token-{query}"


def test_another_token_can_be_chosen(visit, served):
    page = visit(served)
    ids = write(page, served)
    tokens(page).nth(3).click()
    rival = page.evaluate("state.tokens[3].rivals.find(({ id }) => id !== state.tokens[3].id).id")
    page.locator("#token > .bars li:not(.chosen) button").first.click()
    expect(tokens(page)).to_have_count(4)
    eventually_js(page, f"state.tokens.map(({{ id }}) => id).join() === '{','.join(map(str, [*ids[:3], rival]))}'")
    page.locator("#next .bars button").first.click()
    expect(tokens(page)).to_have_count(5)


def test_the_mean_is_in_the_last_column(visit, songs):
    """Mamba-2 has four heads, attention has two: its mean is below the other's, and is reached from it."""
    config = dataclasses.replace(TINY, vocab_size=300, layer_pattern="ML", n_head=2, n_kv_head=2)
    with running(randomized(config), songs[1], max_sequences=1) as served:
        page = visit(served)
        write(page, served)
        columns = ["1", "2", "3", "4", "mean"]
        assert page.locator("#heads .column").all_inner_texts() == columns
        place = "(node) => [...$('heads').children].indexOf(node) % 6"  # a label, then five columns
        for layer, heads in ((1, "1 2 3 4"), (2, "1 2")):
            for head in heads.split():
                button = page.locator(f"#heads [aria-label='Layer {layer}, head {head}']")
                assert button.evaluate(place) == int(head)
            mean = page.locator(f"#heads [aria-label='Layer {layer}, mean of all heads']")
            assert mean.evaluate(place) == 5
        mean.click()
        assert page.locator("#heads .column").all_inner_texts() == columns
        for key, name in (
            ("ArrowUp", "layer 1, mean of all heads"),
            ("ArrowLeft", "layer 1, head 4"), ("ArrowDown", "layer 1, head 4"),
            ("ArrowRight", "layer 1, mean of all heads"), ("ArrowDown", "layer 2, mean of all heads"),
            ("ArrowLeft", "layer 2, head 2"), ("ArrowRight", "layer 2, mean of all heads"),
        ):  # fmt: skip
            page.keyboard.press(key)
            assert page.evaluate("maps.name") == name


def test_layers_without_a_map_say_so(visit, songs):
    config = dataclasses.replace(TINY, vocab_size=300, layer_pattern="RL", n_kv_head=4)
    with running(randomized(config), songs[1], max_sequences=1) as served:
        page = visit(served)
        write(page, served)
        assert page.locator("#heads .none").all_inner_texts() == ["LSTM: no map"]
        assert page.locator("#heads [aria-pressed=true]").get_attribute("aria-label") == "Layer 2, head 1"


# Errors -------------------------------------------------------------------------------------------------------------


def test_a_prompt_that_is_too_long_is_said_in_a_sentence(visit, served):
    page = visit(served)
    write(page, served)
    page.fill("#prompt", PROMPT * 9)
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text(re.compile(r"^\s*The text has \d+ tokens, but the model's context is 32\."))
    expect(page.locator("#retry")).to_be_hidden()
    assert "stale" in page.locator("body").get_attribute("class")
    page.click("#generate")
    expect(page.locator("#generate")).to_be_enabled()
    expect(alert).to_be_visible()
    page.fill("#prompt", "Song 7:")
    expect(alert).to_be_hidden()
    page.fill("#length", "0")
    page.click("#generate")
    expect(alert).to_contain_text("max_tokens = 0: must be greater than or equal to 1.")
    page.click("#dismiss")
    expect(alert).to_be_hidden()


def test_a_server_that_is_gone_and_comes_back(visit, songs):
    with running(*songs, max_sequences=1, grace=0) as served:
        page = visit(served)
        given = len(write(page, served))
        slide(page, "temperature", 0)
        served.hold()
        page.click("#generate")
        served.go(2)
        expect(tokens(page)).to_have_count(given + 2)
        served.server.should_exit = True
        alert = page.get_by_role("alert")
        expect(alert).to_contain_text("The server stopped the generation: the server ends.")
    page.fill("#prompt", "Song")
    expect(alert).to_contain_text("The server does not answer. It may have been stopped")
    page.click("#retry")
    expect(alert).to_contain_text("The server does not answer.")
    assert "".join(tokens(page).all_text_contents()) == PROMPT + "".join(served.parts(PROMPT, 2))
    with running(*songs, max_sequences=1, port=served.port):
        page.click("#retry")
        expect(alert).to_be_hidden()
        page.fill("#prompt", "Song 7:")
        expect(tokens(page)).to_have_count(len(served.tokenizer.encode("Song 7:")))


# Chat, light and dark, narrow ---------------------------------------------------------------------------------------


def test_chat(visit, served, chat_runs):
    assert visit(served).locator("#tabs").is_hidden()  # this run cannot
    model, tokenizer = load(chat_runs / "assistant")
    with running(model, tokenizer, "assistant", max_sequences=1) as chatting:
        page = visit(chatting)
        page.click("#tab-text")
        page.keyboard.press("ArrowRight")
        assert page.locator("#tab-chat").get_attribute("aria-selected") == "true"
        slide(page, "temperature", 0)
        page.fill("#length", "12")
        talk = []
        for said in ("what is 3 plus one?", "and two more?"):
            page.fill("#prompt", said)
            page.press("#prompt", "Enter")
            expect(page.locator("#generate")).to_be_enabled()
            talk.append({"role": "user", "content": said})
            answer = chatting.client.chat.completions.create(
                model="assistant", messages=talk, temperature=0, max_tokens=12
            ).choices[0]
            talk.append({"role": "assistant", "content": answer.message.content})
            eventually_js(page, f"state.messages.length === {len(talk)}")
        assert page.evaluate("state.messages") == talk
        assert page.locator("#text .turn").count() == 4
        assert page.locator("#text .turn").nth(0).inner_text().startswith("<|im_start|>user")
        page.click("#clear")
        expect(tokens(page)).to_have_count(1)
        assert page.evaluate("state.messages.length") == 0


def test_light_dark_and_narrow(visit, served):
    dark = visit(served, color_scheme="dark", viewport={"width": 360, "height": 700}, has_touch=True)
    light = visit(served, color_scheme="light")

    def ground(page: Page) -> int:
        return sum(map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))))

    assert ground(dark) < 150 < 600 < ground(light)
    write(dark, served)
    tokens(dark).nth(3).tap()
    assert dark.evaluate("document.documentElement.scrollWidth") == 360
    for box in dark.locator("button:visible, canvas:visible, textarea").all():
        assert box.bounding_box()["x"] >= 0 and box.bounding_box()["x"] + box.bounding_box()["width"] <= 360
    light.click("#theme")
    assert ground(light) == ground(dark)
    light.click("#theme")
    assert ground(light) > 600


def test_the_keyboard_reaches_everything(visit, served):
    page = visit(served)
    write(page, served)
    page.focus("#theme")
    reached = []
    for _ in range(24):
        reached.append(page.evaluate("document.activeElement.closest('[id]')?.id"))
        page.keyboard.press("Tab")
    order = [
        "theme",
        "prompt",
        "generate",
        "continue",
        "length",
        "text",
        "next",
        "temperature",
        "top-k",
        "top-p",
        "heads",
    ]
    assert [name for name in dict.fromkeys(reached) if name in order] == order
