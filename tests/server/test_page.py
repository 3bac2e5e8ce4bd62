"""The page, in headless Chromium: write, stop, regenerate, probabilities, settings, light, dark."""

import json
import math
import time
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest

from mmrec.inference.decoder import Decoder
from tests.server.browser import CHROMIUM, Browser
from tests.server.conftest import Running, serving

SAMPLING = {"temperature": 0.8, "top_p": 0.95}
"""What the page asks for as long as nobody changes its settings."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def page(browser: Browser, running: Running) -> Browser:
    """The page, new, without what it kept."""
    browser.errors.clear()
    browser.call("Page.navigate", url=running.url)
    browser.wait("document.readyState === 'complete' && document.querySelector('#dot')")
    browser.run("localStorage.clear()")
    browser.call("Page.reload")
    browser.wait("document.querySelector('#dot')?.className === 'ok'")
    return browser


def write(page: Browser, text: str, **settings: Any) -> str:
    """Set the text and settings, let the model write; return the whole text."""
    page.run(f"document.querySelector('#text').textContent = {json.dumps(text)}")
    for name, value in settings.items():
        page.run(f"document.querySelector('#{name}').value = {json.dumps(value)}")
    page.run("document.querySelector('#write').click()")
    return wait_for_text(page)


def wait_for_text(page: Browser) -> str:
    page.wait("document.querySelector('#stop').disabled")
    return str(page.run("document.querySelector('#text').textContent"))


def shown(page: Browser, name: str) -> str:
    return str(page.run(f"document.querySelector('#{name}').textContent"))


def test_write_and_regenerate(page: Browser, running: Running) -> None:
    def text(prompt: str, seed: int) -> str:
        answer = running.text(prompt=prompt, seed=seed, max_tokens=20, **SAMPLING)
        return prompt + str(answer["text"])

    first = text("once", 5)
    assert shown(page, "model") == "small"
    assert write(page, "once", max_tokens=20, seed=5) == first
    assert "seed 5" in shown(page, "status")
    page.run("document.querySelector('#write').click()")  # goes on
    second = text(first, 5)
    assert wait_for_text(page) == second != first
    for seed in (5, 6):  # takes back only what was written last
        page.run(f"document.querySelector('#seed').value = {seed}")
        page.run("document.querySelector('#again').click()")
        assert wait_for_text(page) == text(first, seed)
    assert page.errors == []


def test_settings_are_used(page: Browser, running: Running) -> None:
    settings: dict[str, Any] = {
        "temperature": 1.3,
        "top_p": 0.8,
        "top_k": 9,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.3,
        "max_tokens": 40,
        "seed": 2**63 - 1,
    }
    want = running.text(prompt="x", stop=["zq"], **settings)["text"]
    texts = {"seed": str(settings["seed"]), "stop_texts": "zq\n"}
    assert write(page, "x", **settings | texts) == f"x{want}"


def test_probabilities_on_hover(page: Browser, running: Running) -> None:
    want = running.text(prompt="once", seed=5, max_tokens=30, logprobs=8, **SAMPLING)["logprobs"]
    write(page, "once", max_tokens=30, seed=5)
    spans = "[...document.querySelectorAll('.token')]"
    assert page.run(f"{spans}.map((span) => span.textContent)") == want["tokens"]
    assert page.run("document.querySelector('#tip').hidden")
    page.hover(f"{spans}[3]")
    page.wait("!document.querySelector('#tip').hidden")
    rows = page.run("[...document.querySelectorAll('#tip button span')].map((x) => x.textContent)")
    assert len(rows) == 8
    for row, value in zip(rows, want["top_logprobs"][3].values(), strict=True):
        assert float(row.split()[0]) == pytest.approx(100 * math.exp(value), rel=0.06)
    # another token in its place: the text goes on from there
    choice = page.run(
        "(() => { const b = [...document.querySelectorAll('#tip button:enabled')].pop();"
        "const token = b.firstChild.textContent; b.click(); return token })()"
    )
    kept = "once" + "".join(want["tokens"][:3])
    assert wait_for_text(page).startswith(kept + choice.replace("·", " ").replace("↵", "\n"))


def test_score(page: Browser, decoder: Decoder) -> None:
    page.run("document.querySelector('#text').textContent = 'once upon'")
    page.run("document.querySelector('#score').click()")
    assert wait_for_text(page) == "once upon"
    ids = decoder.tokenizer.encode("once upon")
    bits = -decoder.score(decoder.initial_state(), ids).logprobs.sum() / math.log(2) / 9
    assert shown(page, "status") == f"9 tokens · {bits:.3f} bits per byte"
    assert page.run("document.querySelectorAll('.token').length") == 9


def test_stop(browser: Browser, decoder: Decoder) -> None:
    """A long text is stopped by its reader; the server writes on no more."""
    with serving(decoder) as running:
        engine = running.server._worker.engine
        step = engine.step

        def slow_step() -> bool:
            time.sleep(0.1)
            return step()

        engine.step = slow_step  # type: ignore[method-assign]
        greedy = running.text(prompt="a", temperature=0, max_tokens=2000)
        assert greedy["finish_reason"] == "length"  # it repeats itself
        browser.call("Page.navigate", url=running.url)
        browser.wait("document.querySelector('#dot')?.className === 'ok'")
        for name, value in (("max_tokens", 20_000), ("temperature", 0)):
            browser.run(f"document.querySelector('#{name}').value = {value}")
        browser.run("document.querySelector('#text').textContent = 'a'")
        browser.run("document.querySelector('#write').click()")
        browser.wait("document.querySelectorAll('.token').length > 10")
        browser.run("document.querySelector('#stop').click()")
        text = wait_for_text(browser)
        assert shown(browser, "status") == "stopped"
        assert 10 < len(text) < 20_000
        running.wait_until_idle()
        assert browser.run("document.querySelector('#text').isContentEditable")


def test_an_error_is_shown(page: Browser) -> None:
    assert write(page, "aé") == "aé"
    assert "'é'" in shown(page, "error")


def test_a_key_is_asked_for(browser: Browser, decoder: Decoder) -> None:
    with serving(decoder, api_key="secret") as running:
        browser.call("Page.navigate", url=running.url)
        browser.wait("document.querySelector('#access')?.open")
        assert "API key" in shown(browser, "error")
        browser.run("document.querySelector('#key').value = 'secret'")
        browser.run("document.querySelector('#key').dispatchEvent(new Event('change'))")
        browser.wait("document.querySelector('#dot').className === 'ok'")
        assert len(write(browser, "a", max_tokens=5)) > 0
        assert shown(browser, "error") == ""


def test_light_and_dark(page: Browser) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        page.call("Emulation.setEmulatedMedia", features=[feature])
        style = "getComputedStyle(document.body)"
        colours[scheme] = page.run(f"[{style}.backgroundColor, {style}.color]")
    assert colours["light"][0] != colours["dark"][0]
    assert colours["light"][1] != colours["dark"][1]
    page.run("document.querySelector('#theme').click()")  # light, though the system is dark
    assert page.run("getComputedStyle(document.body).backgroundColor") == colours["light"][0]


def test_nothing_is_loaded_from_elsewhere(page: Browser, running: Running) -> None:
    loaded = page.run("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert {name for name in loaded if not name.startswith((running.url, "data:"))} == set()
    source = files("mmrec.server").joinpath("page.html").read_text()
    assert "https://" not in source
    policy = running.client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
