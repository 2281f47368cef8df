"""The page of `tokencomp play`: what it computes, and the page itself in a real browser."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.serving import http

from tokencomp.cli._playground import NOTHING, Playground
from tokencomp.errors import MediaError, TokenCompError
from tokencomp.inputs.loading import load_model
from tokencomp.inputs.media import load_media
from tokencomp.inputs.packaged import DEFAULT_MODEL, zoo_part
from tokencomp.inputs.prompts import build_inputs, generate, to_model

SAMPLE, QUESTION = "test-attribute-00001.jpg", "What shape is the pink object?"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def play() -> Playground:
    return Playground(*load_model(DEFAULT_MODEL), DEFAULT_MODEL, 4)


def sample() -> str:
    return str(zoo_part("samples") / SAMPLE)


def test_the_answer_without_compression_is_the_models_own(play: Playground) -> None:
    inputs = build_inputs(play.processor, [[load_media(sample())]], [QUESTION])
    plain = generate(play.model, play.processor, to_model(inputs, play.model), 64)[0]
    full, own, rows, pictures = play.ask(sample(), None, QUESTION, "kcenter", 0.75, 0.0, "as usual")
    assert (full, own) == (plain, "square")
    layers = play.model.config.text_config.num_hidden_layers
    assert rows[0] == ["visual tokens", f"64 in {layers} layers", f"16 in {layers} layers"]
    original, seen = (picture for picture, _ in pictures)
    assert original.size and seen.size
    assert play.model.config.text_config._attn_implementation  # the model is left as it was
    assert not hasattr(play.model, "_tokencomp_handle")


def test_what_cannot_be_answered_is_said(play: Playground, tmp_path: Path) -> None:
    with pytest.raises(TokenCompError, match=NOTHING):
        play.ask(None, None, QUESTION, "auto", 0.5, 0.0, "as usual")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(MediaError, match=r"broken\.jpg"):
        play.ask(str(tmp_path / "broken.jpg"), None, QUESTION, "auto", 0.5, 0.0, "as usual")
    with pytest.raises(TokenCompError, match="tower_ratio"):
        play.ask(sample(), None, QUESTION, "auto", 0.25, 0.5, "as usual")


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Any]:
    """The page in a browser, and its address."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with (
        http.process(tmp_path / "log", "--no-browser", name="play", ready="/") as (url, _),
        sync_api.sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page(viewport={"width": 1400, "height": 1200})
        page.goto(url, wait_until="domcontentloaded", timeout=120_000)
        yield page
        browser.close()


@pytest.mark.long
@pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="needs the extra [play]")
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_picture_is_dropped_and_asked_about(page: Any) -> None:
    page.get_by_label("Question").wait_for(timeout=120_000)
    page.get_by_role("button", name="Ask").click()
    page.get_by_text(NOTHING).wait_for(timeout=60_000)
    page.locator("input[type=file]").first.set_input_files(sample())
    page.get_by_label("Question").fill(QUESTION)
    page.locator("img[alt], .image-frame img").first.wait_for(timeout=60_000)
    page.get_by_role("button", name="Ask").click()
    answers = [page.get_by_label(f"Answer {how} compression") for how in ("without", "with")]
    page.wait_for_function("a => a.value", arg=answers[1].element_handle(), timeout=180_000)
    assert [answer.input_value() for answer in answers] == ["square", "square"]
    assert page.get_by_text("visual tokens", exact=True).count()
    page.get_by_text("on average over the layers").first.wait_for(timeout=60_000)
