"""The page at / in a real Chromium, against a real server. Without Chromium these fail: `apt-get install chromium`."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.base import AXE_SCRIPT
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from pydantic import SecretStr
from werkzeug.serving import make_server

from deploy.server.app import create_app
from deploy.server.testing import MemoryLog
from ml.datasets.labels import CLASS_NAMES
from ml.serving.hot_swap import ChampionFollower
from ml.serving.testing import FolderSource
from tests.tiny_models import always, make_onnx

CHROMIUM = Path("/usr/bin/chromium")
DESKTOP, PHONE = {"width": 1100, "height": 900}, {"width": 375, "height": 812}
NARROW, TABLET = {"width": 320, "height": 640}, {"width": 720, "height": 900}
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


class Site:
    """A server on a free port, its fakes, and where its files lie."""

    def __init__(self, folder, settings, **made_of):
        self.folder = folder
        source = FolderSource(folder / "registry")
        source.crown(make_onnx(folder / "1.onnx", **always(3, confidence=0.91)), 1, **made_of)
        follower = ChampionFollower(source, folder / "cache")
        follower.poll()
        self.log = MemoryLog()
        self._server = make_server("127.0.0.1", 0, create_app(settings, follower=follower, log=self.log), threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def picture(self, size=(48, 64), name="picture.png", **options):
        path = self.folder / name
        draw = np.random.default_rng(4)
        Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path, **options)
        return path


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM.exists(), f"{CHROMIUM} is missing. Fix: apt-get install -y chromium"
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=str(CHROMIUM),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield launched
        launched.close()


@pytest.fixture
def site(tmp_path, settings):
    made = Site(tmp_path, settings)
    yield made
    made.close()


class Visit:
    """A page, and everything that went wrong on it that a person would not see."""

    def __init__(self, browser, url, viewport, **options):
        self.context = browser.new_context(viewport=viewport, **options)
        self.page = self.context.new_page()
        self.complaints = []
        self.elsewhere = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("request", lambda r: self._note(r.url, url))
        self.page.goto(url)

    def _note(self, asked, url):
        if not asked.startswith((url, "data:", "blob:")):
            self.elsewhere.append(asked)


@pytest.fixture
def visit(browser, site):
    made = Visit(browser, site.url, DESKTOP)
    yield made
    made.context.close()


def width(row, part):
    return row.locator(part).bounding_box()["width"]


def give(page, path):
    page.locator("#file").set_input_files(path)
    page.locator("#result").wait_for(state="visible")


def test_a_picture_is_answered_with_ten_bars_and_the_model(visit, site):
    page = visit.page
    expect(page.locator("#model")).to_contain_text("cifar10-classifier, version 1 (champion)")
    expect(page.locator("#model .warn")).to_have_text("SYNTHETIC data")
    give(page, site.picture())
    expect(page.locator("#answer")).to_have_text("cat")
    expect(page.locator("#confidence")).to_have_text("91.0 %")
    rows = page.locator("#bars li")
    expect(rows).to_have_count(10)
    assert [row.get_attribute("data-label") for row in rows.all()] == list(CLASS_NAMES)
    page.wait_for_function("document.querySelector('.best .bar').getAnimations().length === 0")
    widths = [
        row.locator(".bar").bounding_box()["width"] / row.locator(".track").bounding_box()["width"]
        for row in rows.all()
    ]
    np.testing.assert_allclose(widths, [0.91 if name == "cat" else 0.01 for name in CLASS_NAMES], atol=0.005)
    assert visit.complaints == []
    assert visit.elsewhere == []


def test_after_a_file_that_is_refused_nothing_is_left_of_the_picture_before(visit, site, tmp_path):
    give(visit.page, site.picture())
    note = tmp_path / "note.txt"
    note.write_text("no picture")
    visit.page.locator("#file").set_input_files(note)
    expect(visit.page.locator("#error")).to_contain_text("PNG, JPEG or WebP")
    expect(visit.page.locator("#result")).to_be_hidden()


def test_what_the_model_saw_is_shown_pixel_for_pixel(visit, site):
    give(visit.page, site.picture())
    shown = visit.page.evaluate(
        """async () => {
            const image = document.getElementById("seen");
            await image.decode();
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            const pen = canvas.getContext("2d");
            pen.drawImage(image, 0, 0);
            return [canvas.width, canvas.height, ...pen.getImageData(0, 0, canvas.width, canvas.height).data];
        }"""
    )
    assert shown[:2] == [32, 32]
    pixels = np.array(shown[2:], np.uint8).reshape(32, 32, 4)[:, :, :3]
    np.testing.assert_array_equal(pixels, site.log.predictions[0].images[0])
    assert visit.page.locator("#seen").evaluate("e => getComputedStyle(e).imageRendering") == "pixelated"


def test_a_picture_can_be_dropped_and_pasted(visit, site):
    send = """async (kind) => {
        const canvas = new OffscreenCanvas(32, 32);
        canvas.getContext("2d").fillRect(0, 0, 32, 32);
        const file = new File([await canvas.convertToBlob({type: "image/webp"})], "x.webp", {type: "image/webp"});
        const data = new DataTransfer();
        data.items.add(file);
        document.body.dispatchEvent(kind === "drop"
            ? new DragEvent("drop", {bubbles: true, cancelable: true, dataTransfer: data})
            : new ClipboardEvent("paste", {bubbles: true, clipboardData: data}));
    }"""
    for count, kind in enumerate(("drop", "paste"), start=1):
        with visit.page.expect_response("**/v1/predict*") as reply:
            visit.page.evaluate(send, kind)
        assert reply.value.status == 200
        assert len(site.log.predictions) == count
    assert visit.complaints == []


def test_the_label_can_be_corrected(visit, site):
    give(visit.page, site.picture())
    visit.page.get_by_label("What is it really?").select_option("ship")
    visit.page.get_by_role("button", name="Tell it").click()
    expect(visit.page.locator("#thanks")).to_have_text("Noted: ship. Thank you.")
    assert list(site.log.feedback.values()) == [CLASS_NAMES.index("ship")]


def test_everything_can_be_reached_with_the_keyboard(visit, site):
    page = visit.page
    give(page, site.picture())
    page.evaluate("document.activeElement.blur()")
    where = """(({id, textContent, firstElementChild}) => id || firstElementChild?.alt || textContent)(
        document.activeElement)"""
    reached = []
    for _ in range(16):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(where))
        assert page.evaluate(
            "() => [document.activeElement, document.activeElement.parentElement]"
            ".some((e) => getComputedStyle(e).outlineStyle !== 'none')"
        ), f"no visible focus on {reached[-1]}"
    assert reached == ["file", *CLASS_NAMES, "copy", "label", "Tell it", "OpenAPI", "Metrics"]
    page.locator("#label").focus()
    page.keyboard.type("tru")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#thanks")).to_contain_text("truck")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("notes.txt", b"hello", "PNG, JPEG or WebP"), ("broken.png", b"\x89PNG hello", "whole PNG")],
)
def test_what_is_no_picture_is_answered_in_words(visit, site, name, content, said):
    path = site.folder / name
    path.write_bytes(content)
    visit.page.locator("#file").set_input_files(path)
    expect(visit.page.get_by_role("alert")).to_contain_text(said)
    expect(visit.page.locator("#result")).to_be_hidden()


def test_an_error_goes_away_with_the_next_good_picture(visit, site):
    (site.folder / "x.txt").write_text("x")
    visit.page.locator("#file").set_input_files(site.folder / "x.txt")
    visit.page.get_by_role("alert").wait_for()
    give(visit.page, site.picture())
    expect(visit.page.locator("#error")).to_be_hidden()


def test_a_phone_photo_over_the_servers_limit_is_made_smaller_first(visit, site):
    path = site.folder / "photo.jpg"
    Image.new("RGB", (4000, 3000), (200, 30, 30)).save(path, quality=70)
    give(visit.page, path)
    assert site.log.predictions[0].images[0, 16, 16].tolist() == pytest.approx([200, 30, 30], abs=3)


def test_a_database_that_is_away_is_said_and_the_button_works_again(visit, site):
    give(visit.page, site.picture())
    site.log.away = True
    visit.page.get_by_role("button", name="Tell it").click()
    expect(visit.page.get_by_role("alert")).to_contain_text("again")
    site.log.away = False
    visit.page.get_by_role("button", name="Tell it").click()
    expect(visit.page.locator("#thanks")).to_contain_text("Noted")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_fits_and_can_be_read(browser, site, scheme, viewport):
    seen = Visit(browser, site.url, viewport, color_scheme=scheme)
    give(seen.page, site.picture())
    assert seen.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
    low = seen.page.evaluate(
        """() => {
            const parts = (text) => text.match(/[\\d.]+/g).map(Number);
            const light = (c) => c.slice(0, 3).map((v) => v / 255)
                .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
                .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
            const ground = (e) => {
                for (; e; e = e.parentElement) {
                    const c = parts(getComputedStyle(e).backgroundColor);
                    if (c.length < 4 || c[3] > 0.99) return c;
                }
                return [255, 255, 255];
            };
            const texts = [...document.querySelectorAll("body *")].filter((e) => e.offsetParent
                && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()));
            return texts.map((e) => {
                const [a, b] = [light(parts(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
                return [e.textContent.trim().slice(0, 30), (a + 0.05) / (b + 0.05)];
            }).filter(([, contrast]) => contrast < 4.5);
        }"""
    )
    assert low == [], "WCAG AA asks for 4.5"
    assert seen.complaints == []
    seen.context.close()


def test_a_server_with_keys_asks_for_one(browser, tmp_path, settings):
    site = Site(tmp_path, settings.model_copy(update={"prediction_api_keys": (SecretStr("open-sesame"),)}))
    seen = Visit(browser, site.url, DESKTOP)
    try:
        page = seen.page
        page.get_by_label("This server asks for an API key").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_contain_text("not one of this server's")
        expect(page.locator("#key-form")).to_be_visible()
        page.get_by_label("This server asks for an API key").fill("open-sesame")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_contain_text("version 1")
        expect(page.locator("#key-form")).to_be_hidden()
        give(page, site.picture())
        expect(page.locator("#answer")).to_have_text("cat")
    finally:
        seen.context.close()
        site.close()


def refuse(page, status, detail=None, **headers):
    """Plays a server that answers the next predictions so; a status of 0: one that is away."""

    def answer(route):
        if not status:
            return route.abort("connectionrefused")
        content_type = "application/problem+json" if detail else "text/html"
        body = json.dumps({"detail": detail}) if detail else "<h1>Gateway</h1>"
        return route.fulfill(status=status, body=body, headers={"Content-Type": content_type, **headers})

    page.unroute("**/v1/predict*")
    page.route("**/v1/predict*", answer)


def example(page, name="deer"):
    page.get_by_role("button", name=name).click()


def test_the_examples_are_ten_drawings_of_ours_and_each_is_answered(visit, site):
    page = visit.page
    shown = page.locator(".example img")
    assert [image.get_attribute("alt") for image in shown.all()] == list(CLASS_NAMES)
    for count, name in enumerate(CLASS_NAMES, start=1):
        with page.expect_response("**/v1/predict*") as reply:
            example(page, name)
        assert reply.value.status == 200
        expect(page.locator(".example[aria-pressed=true] img")).to_have_attribute("alt", name)
        expect(page.locator("#request-id")).to_have_text(str(site.log.predictions[-1].request_id))
        assert len(site.log.predictions) == count
    assert len({prediction.images.tobytes() for prediction in site.log.predictions}) == 10
    assert sum(len(page.request.get(site.url + image.get_attribute("src")).body()) for image in shown.all()) < 20_000
    give(page, site.picture())
    expect(page.locator(".example[aria-pressed=true]")).to_have_count(0)
    assert visit.complaints == []
    assert visit.elsewhere == []


def test_the_whole_way_with_the_keyboard_alone(visit, site):
    page = visit.page
    for _ in range(1 + CLASS_NAMES.index("frog") + 1):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status").first).to_have_text("It says: cat, 91.0 %.")
    for _ in range(len(CLASS_NAMES) - CLASS_NAMES.index("frog") - 1 + 2):
        page.keyboard.press("Tab")
    page.keyboard.type("fr")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#thanks")).to_have_text("Noted: frog. Thank you.")
    assert list(site.log.feedback.values()) == [CLASS_NAMES.index("frog")]
    expect(page.get_by_role("button", name="Tell it")).to_be_focused()


def test_the_request_id_can_be_copied(browser, site):
    seen = Visit(browser, site.url, DESKTOP, permissions=["clipboard-read", "clipboard-write"])
    example(seen.page)
    seen.page.get_by_role("button", name="Copy").click()
    expect(seen.page.locator("#copy")).to_have_text("Copied")
    assert seen.page.evaluate("navigator.clipboard.readText()") == str(site.log.predictions[0].request_id)
    # Where the browser keeps the clipboard to itself, the id is marked instead.
    seen.page.evaluate("() => { navigator.clipboard.writeText = async () => { throw new Error('no') } }")
    seen.page.locator("#copy").click()
    expect(seen.page.locator("#copy")).to_have_text("Marked: press Ctrl-C")
    assert seen.page.evaluate("getSelection().toString()") == str(site.log.predictions[0].request_id)
    seen.context.close()


def test_every_refusal_is_said_and_what_passes_can_be_tried_again(visit, site):
    page, again = visit.page, visit.page.locator("#again")
    for status, detail, headers, said, button in (
        (413, "The body is too large: send at most 10 MB.", {}, "too large", None),
        (415, "A file is declared as 'image/gif'. Fix: send PNG.", {}, "Fix: send PNG.", None),
        (422, "The image is 0 pixels wide.", {}, "0 pixels", None),
        (429, "This key asks too often.", {"Retry-After": "3600"}, "too often", "Try again in 3600 s"),
        (503, "No model is loaded yet.", {"Retry-After": "90"}, "No model", "Try again in 90 s"),
        (502, None, {}, "The server answered 502.", "Try again"),
        (0, None, {}, "does not answer", "Try again"),
    ):
        refuse(page, status, detail, **headers)
        example(page)
        expect(page.get_by_role("alert")).to_contain_text(said)
        expect(page.locator("#result")).to_be_hidden()
        expect(page.locator("#empty")).to_be_visible()
        if button is None:
            expect(again).to_be_hidden()
        else:
            expect(again).to_have_text(button)
            assert again.is_disabled() is (" in " in button)
    page.unroute("**/v1/predict*")
    again.click()
    expect(page.locator("#answer")).to_have_text("cat")
    expect(page.locator("#trouble")).to_be_hidden()


def test_the_button_counts_down_to_when_the_server_wants_to_be_asked(visit):
    page, again = visit.page, visit.page.locator("#again")
    refuse(page, 429, "This key asks too often.", **{"Retry-After": "1"})
    example(page)
    expect(again).to_have_text("Try again in 1 s")
    page.unroute("**/v1/predict*")
    expect(again).to_be_enabled()
    again.click()
    expect(page.locator("#answer")).to_have_text("cat")


@pytest.mark.parametrize(("viewport", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")], ids=["desktop", "phone"])
def test_axe_finds_nothing_in_any_state(browser, site, viewport, scheme):
    # Contrast is judged when colours stand still.
    seen = Visit(browser, site.url, viewport, color_scheme=scheme, reduced_motion="reduce")
    page = seen.page

    def violations():
        found = page.evaluate("(tags) => axe.run({runOnly: tags})", RULES)
        assert len(found["passes"]) > 15
        return [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found["violations"]]

    page.evaluate(AXE_SCRIPT)
    page.locator("#model.is-there").wait_for()
    states = {"empty": violations()}
    example(page)
    page.locator("#result").wait_for()
    states["result"] = violations()
    page.get_by_role("button", name="Tell it").click()
    expect(page.locator("#thanks")).to_contain_text("Noted")
    states["thanks"] = violations()
    site.log.away = True
    page.get_by_role("button", name="Tell it").click()
    page.locator("#feedback-error").wait_for()
    states["feedback refused"] = violations()
    refuse(page, 429, "This key asks too often.", **{"Retry-After": "60"})
    example(page)
    page.locator("#again").wait_for()
    states["refused, wait"] = violations()
    refuse(page, 0)
    example(page)
    expect(page.locator("#again")).to_be_enabled()
    states["away"] = violations()
    refuse(page, 401, "This server asks for a key.")
    example(page)
    page.locator("#key-form").wait_for()
    states["key"] = violations()
    page.evaluate("document.getElementById('model').className = 'is-away'")
    page.evaluate("document.getElementById('random').hidden = false")
    states["model away, random weights"] = violations()
    assert not any(states.values()), states
    seen.context.close()


@pytest.mark.parametrize("viewport", [PHONE, NARROW, TABLET], ids=["phone", "narrow", "tablet"])
def test_a_thumb_finds_everything_on_a_phone(browser, site, viewport):
    seen = Visit(browser, site.url, viewport, has_touch=True, reduced_motion="reduce")
    page = seen.page
    small = """() => [...document.querySelectorAll("button, select, a, .drop, input[type=password]")]
        .filter((e) => e.offsetParent)
        .map((e) => [e.id || e.textContent.trim() || e.firstElementChild?.alt, e.getBoundingClientRect()])
        .filter(([, box]) => box.width < 44 || box.height < 44).map(([name, box]) => [name, box.width, box.height])"""

    def check():
        assert page.evaluate(small) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"

    page.get_by_role("button", name="deer").tap()
    page.locator("#result").wait_for()
    # The answer lies below what was pressed, so the page brings it into view.
    assert page.evaluate("document.getElementById('result').getBoundingClientRect().top < 0.7 * innerHeight")
    check()
    refuse(page, 503, "No model is loaded yet.")
    page.get_by_role("button", name="deer").tap()
    page.locator("#again").wait_for()
    page.evaluate("document.getElementById('key-form').hidden = false")
    check()
    seen.context.close()


def test_nothing_moves_for_who_asked_for_less_motion(browser, site):
    seen = Visit(browser, site.url, DESKTOP, reduced_motion="reduce")
    example(seen.page)
    seen.page.locator("#result").wait_for()
    assert seen.page.evaluate("document.getAnimations().length") == 0
    durations = "[...document.querySelectorAll('*')].map((e) => getComputedStyle(e).transitionDuration)"
    assert set(seen.page.evaluate(durations)) == {"0s"}
    seen.context.close()


def test_what_the_model_was_made_of_is_said_beside_it(browser, tmp_path, settings):
    site = Site(tmp_path, settings, data="SYNTHETIC", weights="RANDOM WEIGHTS")
    seen = Visit(browser, site.url, PHONE)
    expect(seen.page.locator("#model .warn")).to_have_text(["SYNTHETIC data", "RANDOM WEIGHTS"])
    expect(seen.page.locator("#synthetic")).to_be_visible()
    expect(seen.page.locator("#random")).to_be_visible()
    seen.context.close()
    site.close()
    real = Site(tmp_path / "real", settings, data="cifar-10")
    seen = Visit(browser, real.url, PHONE)
    expect(seen.page.locator("#model")).to_contain_text("learnt from cifar-10")
    expect(seen.page.locator("#model .warn")).to_have_count(0)
    expect(seen.page.locator("#synthetic")).to_be_hidden()
    expect(seen.page.locator("#random")).to_be_hidden()
    seen.context.close()
    real.close()
