"""The demo as people see it: headless Chromium, screenshots in runs/demo-screenshots."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from demo_server import SHOTS, Server, chromium, server
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Error, Page, expect, sync_playwright

import vtprune
from vtprune.examples import example

__all__ = ["server"]

pytestmark = pytest.mark.slow
# a busy machine may need long; nothing is measured here
_PATIENCE_MS = 90_000
_FLAGS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
_DESK, _PHONE = {"width": 1280, "height": 1000}, {"width": 390, "height": 844}
expect.set_options(timeout=_PATIENCE_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport=_DESK, permissions=["clipboard-read", "clipboard-write"])
    context.set_default_timeout(_PATIENCE_MS)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, server: Server) -> Page:
    return opened(context, server)


def opened(context: BrowserContext, server: Server, query: str = "") -> Page:
    """The page, once its link was read and the budget is explained."""
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(server.address + query)
    expect(page.locator("#vtp-preview .vtp-preview, #vtp-preview .vtp-error")).to_be_visible()
    expect(page.locator("#vtp-files img, #vtp-files video").first).to_be_visible()
    assert not faults
    return page


def ask(page: Page) -> list[str]:
    """Ask, and wait until all is there; the answers."""
    page.click("#vtp-ask")
    # what was seen before goes first, and what is seen now comes last
    expect(page.locator(".vtp-viewer")).to_be_hidden()
    expect(page.locator(".vtp-viewer svg").first).to_be_visible()
    expect(page.locator("#vtp-costs")).to_contain_text("taken in turn")
    expect(page.locator("#vtp-costs")).to_contain_text("tokens/s")
    return page.locator(".vtp-text").all_inner_texts()


def shoot(page: Page, name: str) -> Path:
    SHOTS.mkdir(parents=True, exist_ok=True)
    path = SHOTS / f"{name}.png"
    page.screenshot(path=path, full_page=True)
    return path


def fill_slider(page: Page, name: str, value: int) -> None:
    box = page.locator(f"{name} input[type=number]")
    box.fill(str(value))
    box.press("Enter")


def pick(page: Page, name: str, value: str) -> None:
    box = page.locator(f"{name} input").first
    box.fill(value)
    box.press("Enter")
    box.blur()


def gone(page: Page, run: int = 0) -> set[str]:
    """Tokens whose patches are greyed."""
    cells = page.locator(".vtp-viewer figure").nth(run).locator("rect.vtp-gone")
    return set(cells.evaluate_all("cells => cells.map(cell => cell.dataset.token)"))


def test_ask_and_see(page: Page) -> None:
    assert ask(page) == ["bottom left", "bottom left"]
    expect(page.locator(".vtp-same")).to_have_text("same answer")
    rows = page.locator("#vtp-costs tbody tr")
    expect(rows).to_have_count(6)
    assert [text.split("\t")[0].strip() for text in rows.all_inner_texts()] == [
        *("visual tokens a layer", "decoder prefill", "vision tower", "KV cache", "prefill time", "decoding"),
    ]
    expect(page.locator(".vtp-viewer rect")).to_have_count(256)
    assert len(gone(page)) == 192
    expect(page.locator(".vtp-at")).to_have_text("decoder layer 11: 64 of 256 tokens")
    shoot(page, "desk")


def test_moving_the_budget_changes_answer_and_picture(page: Page) -> None:
    expect(page.locator("#vtp-preview")).to_contain_text("64 of 256 visual tokens a layer")
    ask(page)
    before = gone(page)
    fill_slider(page, "#vtp-keep", 10)
    expect(page.locator("#vtp-preview")).to_contain_text("26 of 256 visual tokens a layer")
    answers = ask(page)
    assert answers[0] == "bottom left" != answers[1]
    expect(page.locator(".vtp-differs")).to_contain_text("differs from token")
    expect(page.locator(".vtp-text mark").first).to_be_visible()
    after = gone(page)
    assert len(after) == 256 - 26
    assert before < after
    shoot(page, "small-budget")


def test_a_budget_out_of_reach_is_said_before_and_after_asking(page: Page) -> None:
    pick(page, "#vtp-method", "fastv")
    fill_slider(page, "#vtp-keep", 2)
    expect(page.locator("#vtp-preview .vtp-error")).to_contain_text("fastv cannot reach")
    page.click("#vtp-ask")
    expect(page.locator("#vtp-answers .vtp-error")).to_contain_text("fastv cannot reach")
    expect(page.locator("#vtp-answers .vtp-error")).to_have_attribute("role", "alert")
    shoot(page, "out-of-reach")


def test_switching_the_method_changes_picture_and_knobs(page: Page) -> None:
    ask(page)
    flowcut = gone(page)
    pick(page, "#vtp-method", "divprune")
    expect(page.locator("#vtp-preview")).to_contain_text("divprune")
    ask(page)
    expect(page.locator(".vtp-viewer figcaption b")).to_have_text("divprune, keep 25%")
    assert len(gone(page)) == len(flowcut) == 192
    assert gone(page) != flowcut
    page.click("#vtp-knobs button")
    pick(page, "#vtp-method", "fastv")
    expect(page.locator("#vtp-knob-layer")).to_be_visible()
    page.locator("#vtp-knob-layer textarea, #vtp-knob-layer input").first.fill("2")
    page.locator("#vtp-knob-layer textarea, #vtp-knob-layer input").first.blur()
    expect(page.locator("#vtp-method input")).to_have_value("fastv(layer=2)")
    expect(page.locator("#vtp-preview")).to_contain_text("fastv(layer=2)")
    page.click("#vtp-knob-positions input")
    page.get_by_role("option", name="compact").click()
    expect(page.locator("#vtp-method input")).to_have_value("fastv(layer=2, positions='compact')")
    shoot(page, "knobs")


def test_a_method_that_decides_needs_no_budget(page: Page) -> None:
    pick(page, "#vtp-method", "dyvte")
    expect(page.locator("#vtp-decides input")).to_be_checked()
    assert len(ask(page)) == 2
    expect(page.locator(".vtp-viewer figcaption b")).to_have_text("dyvte")


def test_two_methods_on_one_picture(page: Page) -> None:
    page.click("#vtp-combine button")
    pick(page, "#vtp-method", "fastv")
    pick(page, "#vtp-beside", "flowcut/dpp/nearest")
    expect(page.locator("#vtp-preview")).to_contain_text("flowcut/dpp/nearest")
    assert len(ask(page)) == 3
    figures = page.locator(".vtp-viewer figure")
    expect(figures).to_have_count(2)
    shoot(page, "compare")
    # what is merged is no longer there, but not thrown away
    expect(figures.nth(1).locator("rect.vtp-merged")).to_have_count(192)
    expect(figures.nth(0).locator("rect.vtp-merged")).to_have_count(0)
    depth = page.locator(".vtp-depth input")
    depth.fill("0")
    expect(figures.nth(0).locator("rect.vtp-gone")).to_have_count(0)
    expect(figures.nth(0).locator(".vtp-at")).to_have_text("the picture: 256 of 256 tokens")
    depth.press("End")
    expect(figures.nth(0).locator("rect.vtp-gone")).not_to_have_count(0)

    page.locator(".vtp-controls select").select_option("scores")
    expect(figures.nth(0).locator("rect.vtp-scored")).to_have_count(256)
    expect(figures.nth(0).locator(".vtp-at")).to_have_text("scores before decoder layer 1")
    expect(figures.nth(1).locator(".vtp-at")).to_have_text("scores after tower block 2")
    colours = set(figures.nth(0).locator("rect").evaluate_all("cells => cells.map(cell => cell.getAttribute('fill'))"))
    assert len(colours) > 100
    shoot(page, "scores")

    info = page.locator(".vtp-info")
    figures.nth(0).locator("rect").nth(17).hover()
    expect(info).to_contain_text("picture, row 2, column 2")
    expect(info).to_contain_text(re.compile(r"score [-\d.e]+ before decoder layer 1, rank \d+ of 256"))
    expect(info).to_contain_text("after tower block 2")
    figures.nth(0).locator("rect").nth(100).click()
    figures.nth(0).locator("rect").nth(3).hover()
    expect(info).to_contain_text("row 7, column 5")
    figures.nth(0).locator("svg").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(info).to_contain_text("row 8, column 6")
    expect(page.locator("rect.vtp-here")).to_have_count(2)
    page.locator(".vtp-controls select").select_option("gone")
    expect(page.locator(".vtp-legend")).to_contain_text("left early")
    shoot(page, "survival")


def test_a_film_moves_to_a_model_that_reads_films(page: Page) -> None:
    page.click("#vtp-examples button[aria-label^='Thumbnail 7']")
    expect(page.locator("#vtp-question textarea")).to_have_value(example("films").questions[0][0])
    expect(page.locator("#vtp-model input")).to_have_value("tiny:qwen2_vl_plus")
    expect(page.locator("#vtp-files video").first).to_be_visible()
    fill_slider(page, "#vtp-keep", 60)
    expect(page.locator("#vtp-preview")).to_contain_text(re.compile("about (59|60)[.0-9]* % of the visual tokens"))
    answers = ask(page)
    assert answers[0] == example("films").questions[0][1]
    expect(page.locator(".vtp-view")).to_have_count(4)
    page.locator("#vtp-suggestions button", has_text=example("films").questions[2][0]).click()
    expect(page.locator("#vtp-question textarea")).to_have_value(example("films").questions[2][0])
    shoot(page, "film")


def test_several_pictures(page: Page) -> None:
    page.click("#vtp-examples button[aria-label^='Thumbnail 6']")
    expect(page.locator("#vtp-question textarea")).to_have_value(example("pairs").questions[0][0])
    expect(page.locator("#vtp-files img")).to_have_count(2)
    fill_slider(page, "#vtp-keep", 75)
    assert ask(page)[0] == example("pairs").questions[0][1]
    assert page.locator(".vtp-view span").all_inner_texts() == ["picture 1", "picture 2"]
    shoot(page, "pair")


def _clear(page: Page) -> None:
    page.locator("#vtp-files button[aria-label='Clear']").click()
    expect(page.locator("#vtp-files input[type=file]")).to_have_count(1)


def test_bad_files_get_a_message_and_lose_nothing(page: Page, tmp_path: Path) -> None:
    broken = tmp_path / "note.png"
    broken.write_text("no pixels here", encoding="utf-8")
    _clear(page)
    page.set_input_files("#vtp-files input[type=file]", broken)
    expect(page.locator("#vtp-files img")).to_have_count(1)
    page.click("#vtp-ask")
    expect(page.locator("#vtp-answers .vtp-error")).to_contain_text("'note.png' is not a picture that can be read")
    shoot(page, "bad-file")
    # the question is still there, and a good file is answered
    assert page.locator("#vtp-question textarea").input_value() == "where is the digit 4?"
    good = tmp_path / "photo.jpg"
    Image.open(example("scene_1").files[0]).resize((500, 400)).save(good)
    _clear(page)
    page.set_input_files("#vtp-files input[type=file]", good)
    expect(page.locator("#vtp-suggestions")).to_contain_text("Describe the picture.")
    assert ask(page)[0] == "bottom left"
    page.click("#vtp-code button")
    expect(page.locator("#vtp-python")).to_contain_text("Path('photo.jpg')")


def test_other_types_and_sizes_are_refused_at_the_door(page: Page, tmp_path: Path) -> None:
    _clear(page)
    (tmp_path / "page.html").write_text("<script>alert(1)</script>", encoding="utf-8")
    page.set_input_files("#vtp-files input[type=file]", tmp_path / "page.html")
    expect(page.locator(".toast-body").first).to_contain_text("file")
    expect(page.locator("#vtp-files img")).to_have_count(0)
    heavy = tmp_path / "heavy.png"
    with heavy.open("wb") as file:
        file.truncate(70 * 2**20)
    page.reload()
    expect(page.locator("#vtp-files img").first).to_be_visible()
    _clear(page)
    page.set_input_files("#vtp-files input[type=file]", heavy)
    expect(page.locator(".toast-body").first).to_contain_text("exceed the maximum allowed size of 64.0 Mb")
    shoot(page, "too-large")


def test_the_camera_can_be_used(browser: Browser, server: Server) -> None:
    context = browser.new_context(viewport=_DESK, permissions=["camera"])
    context.set_default_timeout(_PATIENCE_MS)
    page = opened(context, server)
    _clear(page)
    page.locator("#vtp-files button[aria-label='Capture from camera']").click()
    page.get_by_text("Click to Access Webcam").click()
    page.click("#vtp-code button")
    expect(page.locator("#vtp-python")).not_to_contain_text("Path(")
    page.locator("button[aria-label='capture photo']").click()
    # the picture has arrived once the code names it
    expect(page.locator("#vtp-python")).to_contain_text("Path(")
    assert len(ask(page)) == 2
    context.close()


def test_two_people_get_their_own_answers(browser: Browser, server: Server) -> None:
    contexts = [browser.new_context(viewport=_DESK) for _ in range(2)]
    asked = [("scene_1", 1), ("scene_0", 1)]
    pages = []
    for context, (name, number) in zip(contexts, asked, strict=True):
        context.set_default_timeout(_PATIENCE_MS)
        page = opened(context, server, f"?example={name}")
        page.fill("#vtp-question textarea", example(name).questions[number][0])
        pages.append(page)
    for page in pages:
        page.click("#vtp-ask")
    for page, (name, number) in zip(pages, asked, strict=True):
        expect(page.locator("#vtp-costs")).to_contain_text("tokens/s")
        expect(page.locator(".vtp-text").first).to_have_text(example(name).questions[number][1])
    for context in contexts:
        context.close()


def test_giving_up_makes_room_for_the_next_question(page: Page) -> None:
    for pause in (20, 100, 200, 400, 800, 1600):
        page.click("#vtp-ask")
        page.wait_for_timeout(pause)
        page.click("#vtp-stop")
        # whatever state the former one is in
        assert ask(page) == ["bottom left", "bottom left"]


def test_asking_again_replaces_the_question(page: Page) -> None:
    page.click("#vtp-ask")
    page.fill("#vtp-question textarea", "where is the teal circle?")
    for _ in range(3):
        page.click("#vtp-ask")
    expect(page.locator(".vtp-viewer svg").first).to_be_visible()
    expect(page.locator(".vtp-text").first).to_have_text("top left")


def test_the_budget_sweep(page: Page) -> None:
    page.click("#vtp-sweep button")
    page.click("#vtp-sweep-button")
    table = page.locator("#vtp-sweep-said table")
    expect(table.locator("thead th")).to_have_count(11)
    row = table.locator("tbody tr").inner_text()
    assert "1.00\u00a0\u2713" in row
    assert "\u2260" in row
    expect(page.locator("#vtp-points")).to_contain_text("visual tokens a layer")
    expect(page.locator("#vtp-points canvas, #vtp-points svg.marks").first).to_be_visible()
    shoot(page, "sweep")


def test_code_files_and_link(page: Page, context: BrowserContext, server: Server) -> None:
    pick(page, "#vtp-method", "gemfilter(layer=3)")
    fill_slider(page, "#vtp-keep", 55)
    page.click("#vtp-code button")
    expect(page.locator("#vtp-command")).to_contain_text("--keep 55%")
    expect(page.locator("#vtp-python")).to_contain_text("vtprune.prune(model, 'gemfilter(layer=3)', keep='55%')")
    answers = ask(page)
    saved = {}
    for name in ("plan", "kept"):
        with page.expect_download() as download:
            page.click(f"#vtp-{name}")
        assert download.value.suggested_filename == f"{name}.json"
        saved[name] = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    plan = vtprune.Plan.from_dict(saved["plan"])
    assert str(plan.stages[0].site) == "restart[3]"
    assert len(saved["kept"]["kept"][0]["indices"][0]) == plan.stages[0].keep
    link = page.locator("#vtp-link textarea, #vtp-link input").first.input_value()
    assert page.url == link
    page.click("#vtp-copy")
    assert page.evaluate("navigator.clipboard.readText()") == link
    again = opened(context, server, f"?{urlsplit(link).query}")
    expect(again.locator("#vtp-method input")).to_have_value("gemfilter(layer=3)")
    assert again.locator("#vtp-keep input[type=number]").input_value() == "55"
    assert ask(again) == answers


def test_a_link_that_is_wrong_is_said(context: BrowserContext, server: Server) -> None:
    page = opened(context, server, "?method=nothing&keep=5%25")
    expect(page.locator(".toast-body")).to_contain_text("Unknown method 'nothing'")
    expect(page.locator("#vtp-method input")).to_have_value("flowcut")


def test_a_phone_shows_all_of_it(browser: Browser, server: Server) -> None:
    context = browser.new_context(viewport=_PHONE, device_scale_factor=2, has_touch=True, is_mobile=True)
    context.set_default_timeout(_PATIENCE_MS)
    page = opened(context, server, "?method=fastv&beside=divprune")
    for name in ("#vtp-combine", "#vtp-knobs", "#vtp-sweep", "#vtp-code"):
        page.click(f"{name} button")
    ask(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= _PHONE["width"]
    # all examples can be seen and tapped
    edges = page.locator("#vtp-examples button[aria-label^='Thumbnail']").evaluate_all(
        "nodes => nodes.map(node => node.getBoundingClientRect().right)"
    )
    assert len(edges) == 7
    assert max(edges) <= _PHONE["width"]
    # the answers stand below the form, and are scrolled to
    assert page.evaluate("window.scrollY") > 300
    page.locator(".vtp-viewer rect").nth(40).tap()
    expect(page.locator(".vtp-info")).to_contain_text("row 3, column 9")
    shoot(page, "phone")
    context.close()


def test_dark(browser: Browser, server: Server) -> None:
    context = browser.new_context(viewport=_DESK, color_scheme="dark")
    context.set_default_timeout(_PATIENCE_MS)
    page = opened(context, server)
    ask(page)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", ground)[:3])) < 150
    text = page.evaluate("getComputedStyle(document.querySelector('.vtp-text')).color")
    assert sum(map(int, re.findall(r"\d+", text)[:3])) > 450
    shoot(page, "dark")
    context.close()


def test_everything_that_can_be_used_has_a_name(page: Page) -> None:
    ask(page)
    for name in ("#vtp-combine", "#vtp-knobs", "#vtp-sweep", "#vtp-code"):
        page.click(f"{name} button")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, textarea, [role=img]')].filter((node) => {
          if (!node.checkVisibility() || node.type === 'file' || node.closest('[aria-hidden=true]')) return false;
          const text = node.getAttribute('aria-label') || node.getAttribute('title') || node.placeholder
            || (node.labels && [...node.labels].map((l) => l.innerText).join('')) || node.innerText || '';
          return !text.trim() && !node.getAttribute('aria-labelledby') && !node.querySelector('img[alt]');
        }).map((node) => node.outerHTML.slice(0, 160))"""
    )
    assert nameless == []


def test_no_request_leaves_this_machine(context: BrowserContext, server: Server) -> None:
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page = opened(context, server)
    ask(page)
    for name in ("#vtp-combine", "#vtp-knobs", "#vtp-sweep", "#vtp-code"):
        page.click(f"{name} button")
    page.click("#vtp-sweep-button")
    expect(page.locator("#vtp-sweep-said table thead th")).to_have_count(11)
    hosts = {urlsplit(url).hostname for url in asked if urlsplit(url).scheme in ("http", "https", "ws", "wss")}
    assert hosts == {"127.0.0.1"}
    assert not server.tried.exists(), server.tried.read_text(encoding="utf-8")
    # the page may not, either
    for script in (
        "() => fetch('https://example.org/')",
        "() => new Promise((done, fail) => { const i = new Image(); i.onload = done;"
        " i.onerror = () => fail(new Error('blocked')); i.src = 'https://example.org/a.png'; })",
    ):
        with pytest.raises(Error):
            page.evaluate(script)
    violations: list[Any] = page.evaluate(
        "() => new Promise((done) => { document.addEventListener('securitypolicyviolation',"
        " (event) => done([event.blockedURI, event.effectiveDirective]));"
        " fetch('https://example.org/').catch(() => 0); })"
    )
    assert violations == ["https://example.org/", "connect-src"]
