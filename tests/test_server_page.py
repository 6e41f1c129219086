"""The page at /, in a real browser, with the bundled model behind it.

BLIP2RT_SCREENSHOTS=docs    writes the pictures of the documentation anew
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="pip install 'blip2rt[serve]'")
pytest.importorskip("playwright", reason="pip install playwright")
from playwright.sync_api import expect, sync_playwright
from serving import Process
from starlette.testclient import TestClient

from blip2rt import Gallery, Pipeline, bundled

CHROMIUM = Path(__file__).parents[1] / ".venv" / "chromium"
FLAGS = ["--headless=shell", "--no-sandbox", "--disable-gpu", "--font-render-hinting=none"]
QUESTION = "what is on the beach?"
# Words that come within one frame are drawn at once, so each event of a stream is given to the page by itself.
RECORD = """() => {
  const ask = window.fetch;
  window.fetch = async (...request) => {
    const response = await ask(...request);
    if (!response.headers.get("content-type").startsWith("text/event-stream")) return response;
    const events = (await response.text()).split(/(?<=\\n\\n)/);
    const one = async (out) => {
      await new Promise((next) => setTimeout(next, 10));
      if (events.length) out.enqueue(new TextEncoder().encode(events.shift()));
      else out.close();
    };
    return new Response(new ReadableStream({ pull: one }), response);
  };
  window.seen = [];
  new MutationObserver(() => window.seen.push(document.getElementById("caption").textContent))
    .observe(document.getElementById("caption"), { childList: true, characterData: true, subtree: true });
}"""


def test_page(client: TestClient) -> None:
    """One page, no outside assets, and a policy that would not let any in."""
    page = client.get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for path in ("/", "/page.js", "/page.css"):
        text = client.get(path).text
        assert "http://" not in text
        assert "https://" not in text
        assert "innerHTML" not in text  # a model's text is text


def image(name: str) -> Path:
    return next(path for path in bundled.IMAGES if path.stem == name)


@pytest.fixture(scope="module")
def site(bundled_engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """The bundled engines and a gallery of their pictures."""
    folder = tmp_path_factory.mktemp("site") / "gallery"
    with Gallery(folder, bundled_engines / "retriever") as gallery:
        gallery.add(bundled.IMAGES, [path.name for path in bundled.IMAGES])
    process = Process(bundled_engines, "--gallery", str(folder), "--pictures", str(bundled.IMAGES[0].parent))
    yield process
    process.process.kill()
    process.process.wait()


@pytest.fixture(scope="module")
def pipe(bundled_engines: Path) -> Pipeline:
    return Pipeline(bundled_engines, threads=1)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not (CHROMIUM / "chromium").exists():
        pytest.skip(f"there is no Chromium: python tests/get_chromium.py {CHROMIUM}")
    own: dict[str, Any] = {
        "LD_LIBRARY_PATH": str(CHROMIUM / "lib"),
        "FONTCONFIG_PATH": str(CHROMIUM),
    }
    with sync_playwright() as drivers:
        browser = drivers.chromium.launch(executable_path=CHROMIUM / "chromium", args=FLAGS, env=os.environ | own)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, site: Process) -> Iterator[Any]:
    """The page on a wide screen; nothing may go wrong in it, and nothing be asked of others."""
    yield from opened(browser, site, {"width": 1100, "height": 900})


def opened(browser: Any, site: Process, size: dict[str, int], **context: Any) -> Iterator[Any]:
    page = browser.new_page(viewport=size, **context)
    page.set_default_timeout(30_000)
    wrong: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(site.url)
    page.wait_for_selector("#drop", state="visible")
    yield page
    page.close()
    assert not wrong
    assert all(url.startswith((site.url, "data:", "blob:")) for url in asked)


def shows(page: Any, place: str, text: str | re.Pattern[str]) -> None:
    """Wait for a text; the page's policy leaves no other way to wait, which is what it is for."""
    expect(page.locator(place)).to_have_text(text, timeout=30_000)


def caption_is(page: Any, expected: str) -> None:
    shows(page, "#caption", expected)
    page.wait_for_selector("#send:enabled")


def screenshot(page: Any, name: str) -> None:
    if folder := os.environ.get("BLIP2RT_SCREENSHOTS"):
        page.wait_for_timeout(300)
        page.screenshot(path=Path(folder) / f"page-{name}.png", full_page=True)


def test_upload_stream_question_search(page: Any, pipe: Pipeline) -> None:
    """All of it as a person does it, with the Pipeline's texts at every place."""
    picture = image("beach")
    page.evaluate(RECORD)
    page.set_input_files("#file", picture)
    expected = pipe.generate(picture, "a photo of").text
    caption_is(page, expected)
    grown = [text for text in page.evaluate("window.seen") if text]
    assert len(set(grown)) >= 2
    assert all(expected.startswith(text) for text in grown)
    assert page.evaluate("document.getElementById('picture').naturalWidth") > 0

    page.click("#more")
    expect(page.locator("#alternatives li")).to_have_count(5, timeout=30_000)
    beams = pipe.caption(picture, num_beams=5, num_return_sequences=5)
    shown = page.eval_on_selector_all("#alternatives li", "items => items.map(item => item.textContent)")
    assert shown == [f"{row.text} {row.score:.2f}" for row in (beams, *beams.alternatives)]

    page.fill("#question", QUESTION)
    page.press("#question", "Enter")
    answer = pipe.generate(picture, f"Question: {QUESTION} Answer:").text
    shows(page, "#talk dd", answer)
    assert page.text_content("#talk dt") == QUESTION

    page.fill("#wanted", "a sheep")
    page.press("#wanted", "Enter")
    expect(page.locator("#found img")).to_have_count(len(bundled.IMAGES), timeout=30_000)
    assert page.text_content("#found li:first-child figcaption").endswith(image("night").name)
    screenshot(page, "wide")

    page.click("#found li:first-child button")  # what is found can be asked about
    caption_is(page, pipe.generate(image("night"), "a photo of").text)
    assert page.query_selector("#talk dd") is None


def test_errors_are_sentences(page: Any, tmp_path: Path) -> None:
    """No picture, and no server; then the page goes on."""
    (tmp_path / "notes.txt").write_text("no picture")
    page.set_input_files("#file", tmp_path / "notes.txt")
    page.wait_for_selector("#error", state="visible")
    assert "is none of JPEG" in page.text_content("#error")
    screenshot(page, "error")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.set_input_files("#file", image("street"))
    shows(page, "#error", "the server cannot be reached")
    page.unroute("**/v1/chat/completions")
    page.set_input_files("#file", image("street"))
    page.wait_for_selector("#error", state="hidden")
    shows(page, "#caption", re.compile(r".{8}"))


def test_keyboard_alone(page: Any) -> None:
    """Every control can be reached and told where one is, in the order of the page."""
    page.set_input_files("#file", image("snow"))
    page.wait_for_selector("#send:enabled")
    reached = []
    for _ in range(7):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert reached == ["file", "more", "question", "send", "wanted", "Search", "API key"]


def test_narrow_screen(browser: Any, site: Process, pipe: Pipeline) -> None:
    """On a phone nothing runs out of the screen, and what is pressed is large enough."""
    for page in opened(browser, site, {"width": 360, "height": 740}, is_mobile=True, has_touch=True):
        page.set_input_files("#file", image("street"))
        caption_is(page, pipe.generate(image("street"), "a photo of").text)
        page.fill("#wanted", "purple stars")
        page.press("#wanted", "Enter")
        page.wait_for_selector("#found img")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        heights = page.eval_on_selector_all("#more, #send, #question, #wanted", "all => all.map(e => e.offsetHeight)")
        assert min(heights) >= 40
        screenshot(page, "narrow")
