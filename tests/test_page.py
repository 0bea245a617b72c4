"""The page of a server, as a browser shows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.browser import chromium, requests_of
from tests.fake_engine import FakeEngine
from tests.http_server import Running, running
from tests.test_server import wait_for
from tests.tiny import TINY, tiny_tokenizer

pytestmark = pytest.mark.slow

ANSWER = "It is <b>not</b> bold & costs nothing."


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def one(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def open_page(browser: Any, server: Running, *, scheme: str = "light", width: int = 1100) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    browser.set_window_size(width, 800)
    browser.get("about:blank")
    browser.get_log("browser")
    requests_of(browser)
    browser.get(server.url)
    wait_for(lambda: one(browser, "#name").text == "tiny")


def ask(browser: Any, text: str) -> None:
    one(browser, "#prompt").send_keys(text + "\n")


def wait_for_answers(browser: Any, count: int) -> None:
    done = "article.assistant[data-done=true]"
    wait_for(lambda: len(browser.find_elements("css selector", done)) == count, seconds=20)


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 420)])
def test_a_mixture_of_experts_shows_its_answer_and_its_experts(
    browser: Any, tokenizer: Any, scheme: str, width: int
) -> None:
    with running(FakeEngine(tokenizer, ANSWER, pause=0.01)) as server:
        open_page(browser, server, scheme=scheme, width=width)
        assert "4 experts, top-2, in 3 layers" in one(browser, "#facts").text
        ask(browser, "what?")
        wait_for_answers(browser, 1)
        assert one(browser, "article.user").text == "what?"
        assert one(browser, "article.assistant .text").text == ANSWER
        figures = one(browser, ".figures").text
        assert "tokens/s" in figures
        assert f"{len(ANSWER)} tokens" in figures
        # Every token has a column: a pixel of its last layer is painted, one below is not.
        painted = browser.execute_script(
            "const canvas = document.querySelector('.strip canvas');"
            "const row = canvas.getContext('2d').getImageData(9 * arguments[0], 9, 21, 1).data;"
            "return [canvas.height, row[4 * 1 + 3], row[4 * 20 + 3]];",
            len(ANSWER) - 1,
        )
        assert painted == [12, 255, 0]
        legend = one(browser, ".legend").text
        assert "expert 1: 33.3%" in legend
        # Hovering over a token of the text, and over its column, names the experts.
        script = (
            "const box = document.querySelector('article.assistant');"
            "box.querySelectorAll('.text span')[3].dispatchEvent(new MouseEvent('mouseenter'));"
            "const first = box.querySelector('.told').textContent;"
            "const canvas = box.querySelector('canvas');"
            "const place = canvas.getBoundingClientRect();"
            "canvas.dispatchEvent(new MouseEvent('mousemove',"
            " {clientX: place.left + 9 * 6 + 2, clientY: place.top + 5}));"
            "return [first, box.querySelector('.told').textContent]"
        )
        text, column = browser.execute_script(script)
        assert text == 'token 4 "i": 1+3 0+2 2+1'
        assert column == 'token 7 "<", MoE layer 1: experts 0 and 2'
        # A second question goes with the first and its answer.
        ask(browser, "why?")
        wait_for_answers(browser, 2)
        prompt = tokenizer.decode(server.engine.taken[-1].prompt_ids)
        assert prompt == f"<|user|>what?</s><|assistant|>{ANSWER}</s><|user|>why?</s><|assistant|>"
        assert browser.get_log("browser") == []
        asked = [url for url in requests_of(browser) if not url.startswith("data:")]
        assert asked
        assert all(url.startswith(server.url) for url in asked)
        # Nothing sticks out sideways, on a telephone either.
        assert browser.execute_script(
            "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        )


def test_an_answer_can_be_stopped_and_a_fault_is_told(browser: Any, tokenizer: Any) -> None:
    engine = FakeEngine(tokenizer, "x" * 2000, pause=0.02)
    engine.executor.spec = TINY["llama"]
    with running(engine) as server:
        open_page(browser, server)
        assert "dense" in one(browser, "#facts").text
        ask(browser, "go on")
        wait_for(lambda: len(one(browser, "article.assistant .text").text) > 5)
        assert not one(browser, ".strip").is_displayed()
        one(browser, "#send").click()
        wait_for_answers(browser, 1)
        wait_for(lambda: engine.finished == {"cancelled": 1})
        assert "stopped" in one(browser, ".figures").text
        engine.fault = "out of order"
        ask(browser, "again")
        wait_for_answers(browser, 2)
        assert one(browser, ".wrong").text == "out of order"


def test_a_key_is_asked_for(browser: Any, tokenizer: Any) -> None:
    with running(FakeEngine(tokenizer, ANSWER), keys=("secret",)) as server:
        browser.get(server.url)
        wait_for(lambda: "No valid API key" in one(browser, "#facts").text)
        one(browser, "summary").click()
        one(browser, "#key").send_keys("secret")
        ask(browser, "hello")
        wait_for_answers(browser, 1)
        assert one(browser, "article.assistant .text").text == ANSWER
