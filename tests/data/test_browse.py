import http.client
import http.server
import io
import json
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlencode

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from groundwork.data.browse import scan as scan_module
from groundwork.data.browse.annotation import Entity, find_entities, segments
from groundwork.data.browse.collection import Collection
from groundwork.data.browse.description import brief, full
from groundwork.data.browse.pictures import overlay
from groundwork.data.browse.run_lengths import decode_run_lengths
from groundwork.data.browse.scan import Filters
from groundwork.data.browse.server import Browser
from groundwork.data.browse.training_order import check_sample
from groundwork.data.dataset import open_dataset
from groundwork.data.knowledge.index import KnowledgeIndex
from groundwork.data.knowledge.senses import Knowledge
from groundwork.data.samples import Concept, Sample
from groundwork.data.shard_index import ShardError
from groundwork.data.shards import write_shards
from groundwork.data.stream import MAX_ATTEMPTS, Source, Stream

SEED = 5
BATCH = 8
SAMPLES = 40
#: Numbers of the samples that training cannot use.
BAD = (2, 9, 21)
TEXT = "a 🐕 dog beside a crate"


def picture(width: int, height: int, file_format: str = "PNG", **options: Any) -> bytes:
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format, **options)
    return buffer.getvalue()


def gray(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def sample(number: int) -> Sample:
    key, text = f"s{number:03d}", f"plain number {number}"
    if number == 0:
        labels = np.zeros((24, 32), np.uint16)
        labels[2:10, 4:16], labels[12:20, 18:30] = 1, 2
        boxes = [
            {"xyxy": [4, 2, 16, 10], "category": "dog", "spans": [[2, 7]], "pair": 1},
            {"xyxy": [18, 12, 30, 20], "label": 1, "spans": [[17, 22]], "crowd": True},
        ]
        info = {
            "width": 32,
            "height": 24,
            "label": 0,
            "captions": [TEXT, "another caption"],
            "boxes": boxes,
            "qa": [{"question": "Where is the dog?", "answers": ["beside a crate", "left"]}],
            "weather": "unheard of",
        }
        members = {
            "instances.png": gray(labels),
            "shadows.png": gray(np.roll(labels, 2, 0)),
            "depth.png": gray((1000 + 10 * np.arange(32 * 24).reshape(24, 32)).astype(np.uint16)),
            "notes.npz": b"PK",
        }
        return Sample(key, picture(32, 24), "png", TEXT, info, members)
    if number == 2:
        return Sample(key, b"<html>403 Forbidden</html>", "jpg", "an error page", {})
    if number == 4:
        return Sample(key, b"", "", "a clip", {"fps": 25}, {"mp4": bytes(range(256)) * 4})
    if number == 5:
        exif = Image.Exif()
        exif[0x0112] = 6  # on its side
        return Sample(key, picture(1200, 900, "JPEG", exif=exif), "jpg", "large", {})
    if number == 21:
        return Sample(key, picture(16, 16), "png", text, {"label": "seven"})
    return Sample(key, picture(16 + number, 16), "png", text, {"label": number % 2})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("browse") / "pets & crates"
    splits = [("train", sample(n)) for n in range(SAMPLES)]
    splits += [("val", Sample(f"v{n}", picture(9, 9), "png", "", {})) for n in range(3)]
    write_shards(
        splits,
        out,
        name="pets",
        source={"kind": "test"},
        licence="CC0",
        concepts=[Concept(0, "dog", ("hound",)), Concept(1, "crate")],
        max_samples=16,
    )
    # a bit flips on the disk
    image = open_dataset(str(out)).read(9).image
    tar = out / "train-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(image, image[:-1] + bytes([image[-1] ^ 1])))
    return out


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)


class Client:
    """What a browser on this machine would send, or anything else."""

    def __init__(self, server: Browser) -> None:
        self.server = server

    def send(self, path: str, method: str = "GET", **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=20)
        try:
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, headers=sent)
            response = connection.getresponse()
            return Answer(response.status, dict(response.headers), response.read())
        finally:
            connection.close()

    def get(self, what: str, **parameters: Any) -> Answer:
        return self.send(f"/api/{what}?{urlencode(parameters)}")

    def scan(self, **parameters: Any) -> list[dict[str, Any]]:
        answer = self.get("scan", split="train", **parameters)
        assert answer.status == 200, answer.content
        return [json.loads(line) for line in answer.content.splitlines()]

    def matches(self, **parameters: Any) -> list[int]:
        return [line["match"]["number"] for line in self.scan(**parameters) if "match" in line]


def serving(collection: Collection) -> Iterator[Client]:
    server = Browser(collection)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield Client(server)
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    yield from serving(Collection(str(folder), seed=SEED, global_batch=BATCH, step=3))


# --- what it shows


def test_file_order_numbers_the_samples_as_the_data_set_does(client: Client, folder: Path) -> None:
    dataset = open_dataset(str(folder))
    answer = client.get("list", split="train", start=0, count=200).json
    assert answer["total"] == len(dataset) == SAMPLES
    assert [entry["key"] for entry in answer["entries"]] == [f"s{n:03d}" for n in range(SAMPLES)]
    assert client.get("list", split="val", start=1, count=9).json["total"] == 3


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_step_shows_what_a_stream_trains_on_with_the_same_samples_replaced(
    folder: Path, shuffle: bool
) -> None:
    def decode(sample: Sample, _rng: np.random.Generator) -> str:
        check_sample(sample, 0)
        return sample.key

    stream = Stream([Source(open_dataset(str(folder)), decode)], seed=SEED, shuffle=shuffle)
    positions = list(range(3 * SAMPLES))  # several epochs, so all bad ones are met more than once
    keys, faults = stream.__getitems__(positions)
    collection = Collection(str(folder), seed=SEED, shuffle=shuffle)
    for client in serving(collection):
        entries = client.get(
            "list", split="train", order="training", start=0, count=len(positions)
        ).json["entries"]
    assert [entry["position"] for entry in entries] == positions
    assert [entry["key"] for entry in entries] == keys
    shown = [(e["position"], bad["key"], bad["reason"]) for e in entries for bad in e["replaced"]]
    assert shown == [(fault.position, fault.key, fault.reason) for fault in faults]
    assert {bad["number"] for e in entries for bad in e["replaced"]} == set(BAD)


def test_a_position_without_any_good_sample_says_that_training_stops(tmp_path: Path) -> None:
    samples = [("train", Sample(f"b{n}", b"x", "png", "", {})) for n in range(3)]
    write_shards(samples, tmp_path / "o", name="o", source={}, licence="")
    for client in serving(Collection(str(tmp_path / "o"))):
        answer = client.get("list", split="train", order="training", start=0, count=1)
    [entry] = answer.json["entries"]
    assert len(entry["replaced"]) == MAX_ATTEMPTS
    assert "training stops" in entry["error"]


def test_a_sample_is_described_with_all_that_its_info_says(client: Client) -> None:
    shown = client.get("sample", split="train", number=0).json
    assert shown["diagnosis"] is None and shown["problems"] == []
    assert shown["size"] == [32, 24]
    assert shown["class"] == {
        "label": "0",
        "name": "dog",
        "aliases": ["hound"],
        "heldout": False,
        "knowledge": None,
    }
    assert [box["name"] for box in shown["boxes"]] == ["dog", "crate"]
    assert [box["crowd"] for box in shown["boxes"]] == [False, True]
    parts = shown["texts"][0]["segments"]
    assert {part["text"]: part["boxes"] for part in parts if part["boxes"]} == {
        "🐕 dog": [0],
        "crate": [1],
    }
    assert shown["texts"][1]["segments"][0]["text"] == "another caption"
    assert shown["qa"] == [{"question": "Where is the dog?", "answers": ["beside a crate", "left"]}]
    assert {member["name"]: member["kind"] for member in shown["members"]} == {
        "instances.png": "labels",
        "shadows.png": "labels",
        "depth.png": "depth",
        "notes.npz": "file",
    }
    assert '"weather": "unheard of"' in shown["raw"]


@pytest.mark.parametrize(
    ("number", "diagnosis"),
    [(2, "neither JPEG, PNG nor WebP"), (9, "checksum"), (21, "json.label is 'seven'")],
)
def test_a_bad_sample_is_shown_with_its_diagnosis(
    client: Client, number: int, diagnosis: str
) -> None:
    assert diagnosis in client.get("sample", split="train", number=number).json["diagnosis"]


FIELDS = st.sampled_from(
    [
        *("width", "height", "label", "captions", "boxes", "qa"),
        *("xyxy", "spans", "segmentation", "category", "question", "answers"),
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(FIELDS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(info=st.dictionaries(FIELDS, VALUES, max_size=6), text=st.text(max_size=8))
def test_any_info_can_be_shown(info: dict[str, Any], text: str) -> None:
    class One:
        concepts: ClassVar = {0: Concept(0, "dog")}

        def where(self, _number: int) -> tuple[str, str]:
            return "t.tar", "k"

        def diagnosis(self, _number: int) -> None:
            return None

        def read(self, _number: int) -> Sample:
            return Sample("k", b"x", "png", text, info)

    shown = full(One(), 0, None)  # type: ignore[arg-type]
    json.dumps([shown, brief(One(), 0)], allow_nan=False)  # type: ignore[arg-type]
    if text:
        assert "".join(part["text"] for part in shown["texts"][0]["segments"]) == text


def test_what_is_wrong_with_the_info_of_a_sample_is_said(tmp_path: Path) -> None:
    info = {
        "boxes": [{"xyxy": [1, 2, "3", 4]}, 7, {"xyxy": [0, 0, 1, 1], "spans": [[2, 99]]}],
        "captions": "one",
        "qa": [{"answer": "no question"}],
    }
    samples = [("train", Sample("k", picture(4, 4), "png", "text", info))]
    write_shards(samples, tmp_path / "o", name="o", source={}, licence="")
    shown = full(Collection(str(tmp_path / "o")).split("train"), 0, None)
    told = "\n".join(shown["problems"])
    for expected in ("box 0: xyxy is [1, 2, '3', 4]", "box 1: 7", "box 2: span [2, 99]"):
        assert expected in told
    assert "captions: one" in told and "qa: " in told


def test_plain_tars_with_odd_json_are_shown(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "plain.tar", "w") as tar:
        for name, content in (
            ("a.png", picture(5, 5)),
            ("a.json", rb'{"half": "\ud800", "label": 12345678901234567890, "n": NaN}'),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    for client in serving(Collection(str(tmp_path))):
        about = client.get("about").json
        assert about["splits"] == [{"name": "all", "samples": 1}]
        shown = client.get("sample", split="all", number=0)
        assert shown.json["key"] == "a" and "NaN" in shown.json["raw"]
        assert client.get("raw", split="all", number=0).status == 200


def test_a_remote_data_set_is_shown_like_a_local_one(folder: Path) -> None:
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as remote:
        thread = threading.Thread(target=remote.serve_forever, args=(0.02,))
        thread.start()
        for client in serving(Collection(f"http://127.0.0.1:{remote.server_port}")):
            about = client.get("about").json
            entries = client.get("list", split="val", start=0, count=9).json["entries"]
        remote.shutdown()
        thread.join()
    assert {split["name"]: split["samples"] for split in about["splits"]} == {
        "train": SAMPLES,
        "val": 3,
    }
    assert [entry["key"] for entry in entries] == ["v0", "v1", "v2"]


def test_a_split_that_is_none_is_refused_at_start(folder: Path) -> None:
    with pytest.raises(ShardError, match="no split 'test'; it has train, val"):
        Collection(str(folder), trained="test")


# --- texts


@given(data=st.data(), text=st.text(max_size=30))
def test_segments_join_to_the_text_and_cover_each_span_exactly(data: Any, text: str) -> None:
    place = st.integers(0, len(text))
    pairs = data.draw(st.lists(st.tuples(place, place), max_size=5))
    spans = [(n, *sorted(pair)) for n, pair in enumerate(pairs) if pair[0] != pair[1]]
    item = Knowledge("x.n.01", "x", "", (), True)
    drawn = data.draw(st.lists(st.tuples(place, place), max_size=3))
    entities = [Entity(*sorted(pair), item) for pair in drawn if pair[0] != pair[1]]
    parts = segments(text, spans, entities)
    assert "".join(part["text"] for part in parts) == text
    for box, begin, end in spans:
        covered = "".join(part["text"] for part in parts if box in part["boxes"])
        assert covered == text[begin:end]


def test_entities_are_the_longest_nouns_that_the_index_knows(wordnet_index: KnowledgeIndex) -> None:
    text = "The large German shepherd, a dog, sits there on ice-cream cones, in no xyzzy."
    found = {text[e.begin : e.end]: e.knowledge for e in find_entities(wordnet_index, text)}
    assert found["German shepherd"].sense_id == "german_shepherd.n.01"
    assert "animal" in found["dog"].path
    assert found["ice-cream cones"].sense_id == "ice-cream_cone.n.01"
    assert found.keys() == {"German shepherd", "dog", "ice-cream cones"}


def test_knowledge_comes_with_texts_and_classes(
    folder: Path, wordnet_index: KnowledgeIndex
) -> None:
    shown = full(Collection(str(folder)).split("train"), 0, wordnet_index)
    assert "genus Canis" in shown["class"]["knowledge"]["gloss"]
    text = shown["texts"][0]
    senses = {
        p["text"]: text["entities"][p["entity"]]["sense"]
        for p in text["segments"]
        if p["entity"] is not None
    }
    assert senses == {"dog": "dog.n.01", "crate": "crate.n.01"}


# --- pictures


def test_a_large_picture_is_sent_small_and_upright(client: Client) -> None:
    answer = client.get("thumb", split="train", number=5)
    with Image.open(io.BytesIO(answer.content)) as image:
        assert answer.headers["Content-Type"] == "image/jpeg"
        assert image.size == (240, 320)  # of 1200 x 900, stored on its side


def test_a_small_picture_is_sent_as_stored(client: Client) -> None:
    stored = sample(7).image
    for what in ("thumb", "image"):
        answer = client.get(what, split="train", number=7)
        assert (answer.content, answer.headers["Content-Type"]) == (stored, "image/png")


def test_a_picture_that_cannot_be_decoded_gives_the_reason(client: Client) -> None:
    answer = client.get("thumb", split="train", number=2)
    assert answer.status == 422 and "neither JPEG" in answer.json["error"]


def rgba(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_labels_are_coloured_alike_in_all_maps_and_nothing_is_transparent(client: Client) -> None:
    maps = [
        rgba(client.get("overlay", split="train", number=0, name=name).content)
        for name in ("instances.png", "shadows.png")
    ]
    labels = np.asarray(Image.open(io.BytesIO(sample(0).members["instances.png"])))
    np.testing.assert_array_equal(maps[0][..., 3], np.where(labels > 0, 255, 0))
    np.testing.assert_array_equal(np.roll(maps[0], 2, 0), maps[1])
    assert len(np.unique(maps[0].reshape(-1, 4), axis=0)) == 3


@pytest.mark.parametrize("near_is_dark", [True, False])
def test_depth_is_brightest_where_it_is_near(near_is_dark: bool) -> None:
    values = np.array([[0, 500], [900, 60_000]], np.uint16)
    shown = rgba(overlay("depth.png", gray(values), near_is_dark=near_is_dark)).astype(int)
    assert shown[0, 0, 3] == 0 and shown[0, 1, 3] == 255
    near, far = shown[0, 1, :3].sum(), shown[1, 1, :3].sum()
    assert bool(near > far) is near_is_dark


@pytest.mark.parametrize("compressed", [True, False])
def test_run_lengths_are_decoded_as_pycocotools_does(compressed: bool) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for height, width, share in ((7, 5, 0.5), (300, 200, 0.5), (40, 400, 0.001), (9, 9, 1.0)):
        mask = rng.random((height, width)) < share
        encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        counts: Any = encoded["counts"].decode()
        if not compressed:
            flat = np.concatenate([[False], mask.T.ravel()])
            counts = np.diff(np.flatnonzero(np.diff(flat, prepend=True, append=not flat[-1])))
            counts = counts.tolist()
            counts[0] -= 1
        decoded = decode_run_lengths({"size": [height, width], "counts": counts})
        assert decoded is not None
        np.testing.assert_array_equal(decoded, mask)


@settings(max_examples=200)
@given(
    size=st.lists(st.integers(-1, 40), max_size=3) | st.just([2**24, 2**24]),
    counts=st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=30)
    | st.lists(st.integers(-5, 2**40) | st.none(), max_size=8),
)
def test_run_lengths_that_are_nonsense_draw_nothing(size: list[int], counts: Any) -> None:
    mask = decode_run_lengths({"size": size, "counts": counts})
    assert mask is None or mask.shape == tuple(size)


def test_masks_of_run_lengths_are_drawn_by_box(tmp_path: Path) -> None:
    boxes = [
        {"xyxy": [0, 0, 1, 2], "segmentation": {"size": [2, 3], "counts": [0, 2, 4]}},
        {"xyxy": [0, 0, 9, 9], "segmentation": {"size": [2, 3], "counts": [99]}},
        {"xyxy": [2, 0, 3, 2], "segmentation": {"size": [2, 3], "counts": [4, 2]}},
    ]
    samples = [("train", Sample("k", picture(3, 2), "png", "", {"boxes": boxes}))]
    samples += [("train", Sample("l", picture(3, 2), "png", "", {"boxes": boxes[1:2]}))]
    write_shards(samples, tmp_path / "o", name="o", source={}, licence="")
    for client in serving(Collection(str(tmp_path / "o"))):
        assert client.get("sample", split="train", number=0).json["runLengths"]
        shown = rgba(client.get("segments", split="train", number=0).content)
        assert client.get("segments", split="train", number=1).status == 404
    np.testing.assert_array_equal(shown[..., 3], [[255, 0, 255]] * 2)
    assert (shown[0, 0] != shown[0, 2]).any()


# --- filters


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"text": "NUMBER 7"}, [7]),
        ({"text": "s03"}, list(range(30, 40))),
        ({"text": "unheard"}, [0]),
        ({"boxes": 1}, [0]),
        ({"label": 0, "boxes": 0}, list(range(6, 40, 2))),
        ({"smallest": 100}, [5]),
        ({"largest": 20, "label": 1}, [1, 3]),
        ({"bad": 1}, list(BAD)),
        ({"bad": 1, "text": "error page"}, [2]),
        ({"text": "<nothing> & 'like' \"this\""}, []),
    ],
)
def test_filters_find_what_they_say(
    client: Client, filters: dict[str, Any], expected: list[int]
) -> None:
    assert client.matches(**filters) == expected


def test_a_search_in_the_order_of_training_keeps_that_order(client: Client) -> None:
    lines = client.scan(order="training", label=0)
    order = [line["match"] for line in lines if "match" in line]
    positions = [entry["position"] for entry in order]
    assert positions == sorted(positions)
    listed = client.get("list", split="train", order="training", start=0, count=SAMPLES).json
    at = {e["position"]: e["number"] for e in listed["entries"] if not e["replaced"]}
    assert [entry["number"] for entry in order] == [at[position] for position in positions]


def test_a_search_is_bounded_and_goes_on_where_it_stopped(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_module, "MAX_MATCHES", 3)
    found, start = [], 0
    while start is not None:
        lines = client.scan(label=1, start=start)
        batch = [line["match"]["number"] for line in lines if "match" in line]
        assert len(batch) <= 3
        found += batch
        start = lines[-1]["next"]
    assert found == [n for n in range(SAMPLES) if n % 2 and n not in (5, *BAD)]
    monkeypatch.setattr(scan_module, "MAX_SECONDS", -1.0)
    assert client.scan(label=1)[-1] == {"done": True, "next": 0}


# --- what it refuses


def test_only_loopback_is_listened_on(client: Client) -> None:
    port = client.server.server_port
    listening = {
        connection.laddr.ip
        for connection in psutil.Process().net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    assert listening == {"127.0.0.1"}


@pytest.mark.parametrize(
    "path",
    [
        "/../../../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "//localhost/api/about",
        "http://localhost/api/about",
        "/server.py",
        "/page.css/../server.py",
        "/manifest.json",
        "/train-000000.tar",
        "/api/",
        "/api/member?split=train&number=0&name=../../manifest.json",
        "/api/member?split=train&number=0&name=/etc/passwd",
        "/api/member?split=../train&number=0&name=depth.png",
        "/api/overlay?split=train&number=0&name=notes.npz",
        "/api/image?split=train&number=40",
        "/api/image?split=train&number=4",
    ],
)
def test_nothing_but_samples_and_the_page_is_served(client: Client, path: str) -> None:
    answer = client.send(path)
    assert answer.status == 404 and set(answer.json) == {"error"}


@pytest.mark.parametrize("number", ["-1", "1e3", "0x1", "٣", "9" * 40, "", "1 "])
def test_a_number_that_is_none_is_refused(client: Client, number: str) -> None:
    assert client.get("image", split="train", number=number).status == 400
    assert client.get("list", split="train", start=number, count=1).status == 400


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil", ""])
def test_other_names_of_this_machine_are_refused(client: Client, host: str) -> None:
    for path in ("/", "/api/about", "/api/image?split=train&number=0"):
        answer = client.send(path, Host=host)
        assert answer.status == 403 and b"pets" not in answer.content


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1:80", "[::1]:9"])
def test_names_of_loopback_are_accepted_on_any_port(client: Client, host: str) -> None:
    assert client.send("/api/about", Host=host).status == 200  # a forwarded port has another number


def test_other_sites_cannot_ask(client: Client) -> None:
    for site in ("cross-site", "same-site"):
        assert client.send("/api/about", Sec_Fetch_Site=site).status == 403
    assert client.send("/api/about", Sec_Fetch_Site="same-origin").status == 200


def test_a_search_ends_when_the_page_that_asked_has_gone(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_module, "PROGRESS_S", 0.0)
    searched = []

    def slowly(_filters: object, _split: object, number: int) -> None:
        searched.append(number)
        time.sleep(0.1)

    monkeypatch.setattr(Filters, "find", slowly)
    for _ in range(2):  # as many as may be at work
        with socket.create_connection(("127.0.0.1", client.server.server_port)) as page:
            page.sendall(b"GET /api/scan?split=train HTTP/1.1\r\nHost: localhost\r\n\r\n")
            page.recv(100)
    time.sleep(0.5)
    before = len(searched)
    monkeypatch.undo()
    assert client.matches(boxes=1) == [0]
    assert len(searched) == before < 2 * SAMPLES


def test_a_defect_is_told_to_the_page(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Collection, "split", None)
    answer = client.get("list", split="val", start=0, count=1)
    assert answer.status == 500 and "TypeError" in answer.json["error"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_written(client: Client, method: str) -> None:
    assert client.send("/api/about", method).status == 501


def test_every_answer_forbids_foreign_code_and_guessed_types(client: Client) -> None:
    for path in ("/", "/main.js", "/api/about", "/api/thumb?split=train&number=0", "/nowhere"):
        headers = client.send(path).headers
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_a_member_is_never_sent_as_a_page(client: Client) -> None:
    answer = client.get("member", split="train", number=0, name="notes.npz")
    assert answer.headers["Content-Type"] == "application/octet-stream"


@pytest.mark.parametrize(
    ("wanted", "part"),
    [
        ("bytes=0-", slice(0, 1024)),
        ("bytes=100-199", slice(100, 200)),
        ("bytes=1000-9999", slice(1000, 1024)),
        ("bytes=-24", slice(1000, 1024)),
        ("bytes=-5000", slice(0, 1024)),
    ],
)
def test_clips_are_sent_in_parts(client: Client, wanted: str, part: slice) -> None:
    path = "/api/member?split=train&number=4&name=mp4"
    content = sample(4).members["mp4"]
    answer = client.send(path, Range=wanted)
    assert (answer.status, answer.content) == (206, content[part])
    assert answer.headers["Content-Range"] == f"bytes {part.start}-{part.stop - 1}/1024"
    assert answer.headers["Content-Type"] == "video/mp4"


def test_a_part_outside_of_a_clip_is_refused_and_an_odd_range_ignored(client: Client) -> None:
    path = "/api/member?split=train&number=4&name=mp4"
    answer = client.send(path, Range="bytes=2000-")
    assert (answer.status, answer.headers["Content-Range"]) == (416, "bytes */1024")
    for odd in ("bytes=-", "lines=0-3", "bytes=1-2,5-6"):
        assert len(client.send(path, Range=odd).content) == 1024
    assert client.send(path, "HEAD").headers["Content-Length"] == "1024"


def test_many_threads_read_the_same_bytes(client: Client) -> None:
    wrong: list[int] = []

    def read() -> None:
        for number in (0, 17, 33, 7, 39, 16):
            expected = sample(number).image
            if client.get("image", split="train", number=number).content != expected:
                wrong.append(number)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
