"""The page of `groundwork shards browse` in a headless Chromium, driven over its debugging pipe."""

import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from groundwork.data.browse.collection import Collection
from groundwork.data.browse.server import Browser
from groundwork.data.order import GlobalOrder, replacement
from groundwork.data.samples import Concept, Sample
from groundwork.data.shards import write_shards

HOSTILE = (
    '<script>window.hacked=1</script><img src=x onerror="window.hacked=1"> '
    "'\"><svg onload=window.hacked=1>"
)
SAMPLES = 150
SEED, BATCH = 3, 7
#: Number of the sample that cannot be decoded.
BROKEN = 2
WAIT_S = 20.0
#: Chromium takes its orders from descriptor 3 and answers on 4; nothing else passes them there.
START = """
import os, sys
orders, answers, *command = sys.argv[1:]
os.dup2(int(orders), 3)
os.dup2(int(answers), 4)
os.execvp(command[0], command)
"""


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def plain(number: int) -> bytes:
    return png(np.full((20, 20, 3), (number, 90, 200), np.uint8))


def samples() -> Iterator[tuple[str, Sample]]:
    labels = np.zeros((240, 320), np.uint8)
    labels[40:160, 30:130] = 1
    boxes = [
        {"xyxy": [30, 40, 130, 160], "category": "red ball", "spans": [[2, 10]]},
        {"xyxy": [180, 80, 300, 200], "category": "crate", "spans": [[20, 27]]},
    ]
    info = {"width": 320, "height": 240, "label": 0, "boxes": boxes}
    info["qa"] = [{"question": "What is red?", "answers": ["the ball"]}]
    members = {
        "instances.png": png(labels),
        "depth.png": png(np.arange(1, 76801, dtype=np.uint16).reshape(240, 320)),
    }
    scene = png(np.full((240, 320, 3), 128, np.uint8))
    yield "train", Sample("scene", scene, "png", "a red ball beside 🎈 a crate", info, members)
    box = {"xyxy": [1, 1, 9, 9], "category": HOSTILE, "spans": [[0, 8]]}
    hostile = {
        "label": 1,
        "boxes": [box],
        "captions": [HOSTILE, f"again {HOSTILE}"],
        "qa": [{"question": HOSTILE, "answers": [HOSTILE]}],
        HOSTILE: HOSTILE,
        "width": 20,
        "height": 20,
    }
    yield "train", Sample("hostile", plain(1), "png", HOSTILE, hostile)
    yield "train", Sample("broken", f"<html>{HOSTILE}".encode(), "jpg", "broken one", {})
    for number in range(3, SAMPLES):
        yield "train", Sample(f"n{number:03d}", plain(number), "png", f"plain {number}", {})
    yield "val", Sample("v0", plain(0), "png", "of another split", {})
    frames = {f"frame.{n:04d}.png": plain(n) for n in range(4)}
    frames |= {f"instances.{n:04d}.png": png(np.eye(20, k=n, dtype=np.uint8)) for n in range(4)}
    tracks = [{"boxes": [[0, 0, 5, 5], None, [2, 0, 7, 5], [3, 0, 8, 5]], "category": "ball"}]
    info = {"width": 20, "height": 20, "fps": 20, "tracks": tracks}
    yield "clips", Sample("frames", b"", "", "a ball rolls", info, frames)
    if (film := mp4(12)) is not None:
        info = {"width": 64, "height": 64, "fps": 12}
        yield "clips", Sample("film", b"", "", "it gets bright", info, {"mp4": film})


def mp4(frames: int) -> bytes | None:
    """A second of video that turns from black to white; None without PyAV."""
    try:
        import av
    except ImportError:
        return None
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=frames)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(frames):
            pixels = np.full((64, 64, 3), 255 * number // (frames - 1), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


class Page:
    """A tab of a headless Chromium, spoken to in the DevTools protocol."""

    def __init__(self, profile: Path) -> None:
        (orders, to_chromium), (from_chromium, answers) = os.pipe(), os.pipe()
        # beyond 3 and 4, which the child gives to Chromium
        high = [fcntl.fcntl(handle, fcntl.F_DUPFD, 20) for handle in (orders, answers)]
        command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu"]
        command += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *map(str, high), *command],
            pass_fds=high,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for handle in (orders, answers, *high):
            os.close(handle)
        self.orders, self.answers = to_chromium, os.fdopen(from_chromium, "rb")
        self.numbers = count(1)
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None
        self.watchdog = threading.Timer(120, self.process.kill)
        self.watchdog.start()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self.watchdog.cancel()
        self.process.kill()
        self.process.wait(10)
        os.close(self.orders)
        self.answers.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.numbers)
        order: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self.session is not None:
            order["sessionId"] = self.session
        os.write(self.orders, json.dumps(order).encode() + b"\0")
        while True:
            message = self._message()
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                return dict(message["result"])
            self.events.append(message)

    def _message(self) -> dict[str, Any]:
        content = bytearray()
        while (byte := self.answers.read(1)) != b"\0":
            assert byte, "Chromium has ended"
            content += byte
        return dict(json.loads(content))

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not self.run(condition):
            assert time.monotonic() < deadline, f"never: {condition}\n{self.run(TEXT)}"
            time.sleep(0.02)

    def show(self, url: str) -> None:
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        self.wait("document.body?.dataset.ready === location.hash")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if len(key) == 1 and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, **text)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def all(self, selector: str, what: str = "textContent") -> list[Any]:
        """A property of all elements that a selector finds."""
        return list(self.run(f"[...document.querySelectorAll({selector!r})].map(e => e.{what})"))


TEXT = "document.querySelector('main')?.textContent"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if shutil.which("chromium") is None:
        pytest.skip("no chromium here: `apt-get install chromium`")
    opened = Page(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    out = tmp_path_factory.mktemp("page") / "o"
    concepts = [Concept(0, "ball"), Concept(1, HOSTILE)]
    write_shards(samples(), out, name="look", source={}, licence="", concepts=concepts)
    browser = Browser(Collection(str(out), seed=SEED, global_batch=BATCH, step=4))
    thread = threading.Thread(target=browser.serve_forever, args=(0.02,))
    thread.start()
    yield browser
    browser.shutdown()
    thread.join()
    browser.server_close()


@pytest.fixture
def show(page: Page, server: Browser) -> Iterator[Callable[[str], Page]]:
    """Opens a view. Afterwards: no error, no refused code, and nothing asked of anyone else."""
    page.events.clear()
    root = f"http://127.0.0.1:{server.server_port}/"

    def opened(view: str) -> Page:
        page.show(f"{root}#{view}")
        return page

    yield opened
    page.run("1")
    events = [(event["method"], event.get("params", {})) for event in page.events]
    asked = [what["request"]["url"] for name, what in events if name == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith((root, "about:"))] == []
    assert [what for name, what in events if name == "Runtime.exceptionThrown"] == []
    logged = [what["entry"] for name, what in events if name == "Log.entryAdded"]
    # the thumbnail of the broken image is refused, as it should be
    assert [entry for entry in logged if "/api/thumb?" not in entry.get("url", "")
            and "/api/image?" not in entry.get("url", "")] == []  # fmt: skip
    assert page.run("window.hacked === undefined")


def test_the_grid_shows_pages_of_thumbnails(show: Callable[[str], Page]) -> None:
    page = show("")
    assert page.all(".tile", "dataset.key")[:4] == ["scene", "hostile", "broken", "n003"]
    assert len(page.all(".tile", "dataset.key")) == 60
    page.wait("document.querySelector('.tile img').naturalWidth === 320")
    page.press("PageDown")
    page.press("PageDown")
    page.wait("document.querySelector('.tile')?.dataset.key === 'n120'")
    assert len(page.all(".tile", "dataset.key")) == SAMPLES - 120
    assert page.all("[data-page='1']", "disabled") == [True]


def test_a_broken_image_is_marked_with_the_reason(show: Callable[[str], Page]) -> None:
    page = show("")
    page.wait(
        "document.querySelector('.is-bad .broken small')?.textContent.includes('neither JPEG')"
    )
    assert page.all(".is-bad", "dataset.key") == ["broken"]


def test_boxes_masks_and_grounded_words_are_drawn(show: Callable[[str], Page]) -> None:
    page = show("sample=1")
    page.wait("document.querySelector('img.main').naturalWidth === 320")
    assert page.all(".shapes rect", "getAttribute('x')") == ["30", "180"]
    assert page.all(".labels span") == ["red ball", "crate"]
    assert page.all("mark") == ["red ball", "a crate"]
    colours = page.all(".shapes rect, mark", "style.getPropertyValue('--hue')")
    assert colours[:2] == colours[2:] and colours[0] != colours[1]
    # the drawn box lies where the picture has it, however large that is shown
    left, width = page.run(
        """(() => {
          const r = document.querySelector('.shapes rect').getBoundingClientRect();
          const c = document.querySelector('.canvas').getBoundingClientRect();
          return [(r.left - c.left) / c.width, r.width / c.width];
        })()"""
    )
    assert left == pytest.approx(30 / 320, abs=0.005)
    assert width == pytest.approx(100 / 320, abs=0.01)
    page.wait("document.querySelector('img.layer.labels').naturalWidth === 320")
    assert page.all("img.layer:not([hidden])", "dataset.member") == ["instances"]
    assert "What is red?" in page.run(TEXT) and "the ball" in page.run(TEXT)


def test_keys_switch_overlays(show: Callable[[str], Page]) -> None:
    page = show("sample=1")
    for key, selector in (("m", "img.layer.labels"), ("d", "img.layer.depth"), ("b", ".drawn")):
        shown = f"getComputedStyle(document.querySelector({selector!r})).display !== 'none'"
        before = page.run(shown)
        page.press(key)
        assert page.run(shown) is not before
        page.press(key)
        assert page.run(shown) is before


def test_pointing_at_words_highlights_their_box(show: Callable[[str], Page]) -> None:
    page = show("sample=1")
    page.run("document.querySelectorAll('mark')[1].dispatchEvent(new MouseEvent('mouseenter'))")
    assert page.all(".shapes .hot", "getAttribute('x')") == ["180"]
    assert page.all(".labels .hot") == ["crate"]


def test_hostile_texts_are_shown_as_texts(show: Callable[[str], Page]) -> None:
    for view in ("", "at=1&sample=1", "text=hacked", "label=1"):
        page = show(view)
        page.wait("document.querySelector('[data-key=hostile]') !== null")
        assert page.all("main script, main svg[onload], main img[onerror]", "outerHTML") == []
        assert "<script>window.hacked=1</script>" in page.run(TEXT)
    page = show("at=1&sample=1")
    page.run("document.querySelector('details').open = true")
    assert page.run(TEXT).count("onerror=") >= 6  # text, caption, class, question, answer, JSON
    assert page.all(".labels span")[0].startswith("<script>")


def test_keys_go_from_sample_to_sample_and_back(show: Callable[[str], Page]) -> None:
    page = show("at=4&sample=1")
    shown = "document.querySelector('article.sample')?.dataset.key"
    assert page.run(shown) == "n004"
    page.press("ArrowRight")
    page.wait(f"{shown} === 'n005'")
    page.press("ArrowLeft")
    page.press("ArrowLeft")
    page.wait(f"{shown} === 'n003'")
    page.press("Escape")
    page.wait("document.activeElement?.dataset.key === 'n003'")  # where one was in the grid
    page.press("ArrowRight")
    assert page.run("document.activeElement.dataset.key") == "n004"
    page.press("Enter")
    page.run("document.activeElement.click()")
    page.wait(f"{shown} === 'n004'")


def test_search_by_keyboard(show: Callable[[str], Page]) -> None:
    page = show("")
    page.press("/")
    assert page.run("document.activeElement.id") == "text"
    page.type("plain 14")
    page.run("document.getElementById('search').requestSubmit()")
    page.wait("document.querySelector('.pager')?.dataset.running === 'false'")
    expected = ["n014", *(f"n{number}" for number in range(140, 150))]
    assert page.all(".tile", "dataset.key") == expected
    assert f"11 found in {SAMPLES} of {SAMPLES} samples" in page.run(TEXT)
    page.run("document.querySelectorAll('.tile')[1].click()")
    page.wait("document.querySelector('article.sample')?.dataset.key === 'n140'")
    page.press("ArrowRight")  # to the next one found, not the next one of the data set
    page.wait("document.querySelector('article.sample')?.dataset.key === 'n141'")


def test_a_link_to_a_found_sample_opens_it(show: Callable[[str], Page]) -> None:
    page = show("text=plain+14&at=2&sample=1")
    assert page.all("article.sample", "dataset.key") == ["n141"]


def test_bad_samples_only(show: Callable[[str], Page]) -> None:
    page = show("bad=1")
    page.wait("document.querySelector('.pager')?.dataset.running === 'false'")
    assert page.all(".tile", "dataset.key") == ["broken"]
    assert "neither JPEG" in page.run(TEXT)


def test_locate_shows_the_samples_of_a_step_in_order(
    show: Callable[[str], Page], server: Browser, page: Page
) -> None:
    def numbers(step: int) -> list[str]:
        order = GlobalOrder(SAMPLES, SEED)
        positions = np.arange((step - 1) * BATCH, step * BATCH)
        drawn = zip(positions.tolist(), order.indices(positions).tolist(), strict=True)
        return [str(replacement(SEED, SAMPLES, p, 1) if n == BROKEN else n) for p, n in drawn]

    page.show(server.url)  # as `--locate 4` prints it
    assert page.all(".tile", "dataset.number") == numbers(4)
    assert "positions 21 – 27" in page.run(TEXT)
    page.press("PageDown")
    page.wait("document.querySelector('main').textContent.includes('positions 28 – 34')")
    assert page.all(".tile", "dataset.number") == numbers(5)


def test_a_replaced_sample_is_marked_in_its_step(
    show: Callable[[str], Page], server: Browser
) -> None:
    order = GlobalOrder(SAMPLES, SEED).indices(np.arange(SAMPLES))
    place = order.tolist().index(BROKEN)
    page = show(f"order=step&step={place // BATCH + 1}")
    assert page.all(".tile .badge.warn") == ["replaces 1 bad"]
    page.run("document.querySelector('.tile:has(.badge.warn)').click()")
    page.wait("document.querySelector('.note.warn') !== null")
    assert "broken – image cannot be decoded" in page.run(TEXT)
    assert f"At position {place} " in page.run(TEXT)


def test_other_splits_and_a_dark_page(show: Callable[[str], Page]) -> None:
    page = show("split=val")
    assert page.all(".tile", "dataset.key") == ["v0"]
    ground = "getComputedStyle(document.body).backgroundColor"
    colours = {page.run(ground)}
    page.press("t")
    colours.add(page.run(ground))
    assert colours == {"rgb(246, 247, 249)", "rgb(20, 22, 27)"}


def test_a_clip_of_pictures_plays_with_its_masks_and_boxes(show: Callable[[str], Page]) -> None:
    page = show("split=clips&sample=1")
    sources = "[...document.querySelectorAll('.canvas img')].map(e => e.src.split('name=')[1])"
    boxes = "[...document.querySelectorAll('.shapes rect')].map(e => e.getAttribute('x'))"
    slide = "document.querySelector('.player input')"
    seen = []
    for frame in range(4):
        page.run(f"{slide}.value = {frame}; {slide}.dispatchEvent(new Event('input'))")
        seen.append((page.run(sources), page.run(boxes)))
    names = [[f"frame.{n:04d}.png", f"instances.{n:04d}.png"] for n in range(4)]
    assert [[s.split("&")[0] for s in shown] for shown, _ in seen] == names
    assert [x for _, x in seen] == [["0"], [], ["2"], ["3"]]
    page.press(" ")
    page.wait(f"{slide}.value === '1'")  # after the last one comes the first
    page.press(" ")
    assert page.run("document.querySelector('[data-play]').textContent") == "▶"


def test_a_film_can_be_sought(show: Callable[[str], Page]) -> None:
    pytest.importorskip("av")
    page = show("split=clips&at=1&sample=1")
    page.wait("document.querySelector('video')?.readyState >= 2")
    slide, film = "document.querySelector('.player input')", "document.querySelector('video')"
    page.run(f"{slide}.value = 11; {slide}.dispatchEvent(new Event('input'))")
    page.wait(f"!{film}.seeking && {film}.readyState >= 2 && {film}.currentTime > 0.9")
    brightness = f"""(() => {{
      const canvas = new OffscreenCanvas(1, 1).getContext('2d');
      canvas.drawImage({film}, 0, 0, 1, 1);
      return canvas.getImageData(0, 0, 1, 1).data[0];
    }})()"""
    assert page.run(brightness) > 240
