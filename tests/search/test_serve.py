"""The page, asked as a browser, a stranger and an enemy would: over a real socket, by Chromium."""

import contextlib
import csv
import io
import json
import os
import shutil
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from cmdlab.corpora import load_corpus
from cmdlab.evaluation import evaluate_file
from cmdlab.search import Index, Retriever, encode_pairs, index_pictures
from cmdlab.search.serve import MAX_UPLOAD, make_page
from cmdlab.search.verdicts import read_verdicts

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

from starlette.testclient import TestClient

CHROMIUM = shutil.which("chromium")
VIEWS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]
SAID = "a red circle left of a star"
HOSTILE = "<img src=x onerror=alert(1)> & a star"


@pytest.fixture(scope="module")
def corpus(smoke_corpus):
    return load_corpus(smoke_corpus, "test")


@pytest.fixture(scope="module")
def shelf(corpus, make_index, tmp_path_factory) -> Index:
    """The smoke corpus' test pictures, and a wide photograph with a place written into it."""
    pictures = tmp_path_factory.mktemp("shelf") / "pictures"
    pictures.mkdir()
    for image in corpus.images:
        shutil.copy(image.path, pictures)
    written = Image.Exif()
    written[0x010E] = "at home, Elm Street 5"
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 900, 3), np.uint8))
    wide.save(pictures / f"{HOSTILE}.jpg", exif=written, comment=b"Elm Street 6")
    return make_index(pictures)


@pytest.fixture(scope="module")
def spoilt(make_index, tmp_path_factory) -> Index:
    """An index whose pictures have since become a bomb, gone, and links out of their folder."""
    pictures = tmp_path_factory.mktemp("spoilt") / "pictures"
    (pictures / "d").mkdir(parents=True)
    (pictures.parent / "secret").mkdir()
    Image.new("RGB", (8, 8)).save(pictures.parent / "secret" / "in.png")
    names = ["bomb.png", "gone.png", "link.png", "d/in.png", "f\udce9.png"]
    for number, name in enumerate(names):
        Image.new("RGB", (80, 80), (number, 0, 0)).save(os.fsencode(pictures / name), "PNG")
    index = make_index(pictures)
    (pictures / "bomb.png").write_bytes(bomb())
    (pictures / "gone.png").unlink()
    (pictures / "link.png").unlink()
    (pictures / "link.png").symlink_to(pictures.parent / "secret" / "in.png")
    shutil.rmtree(pictures / "d")
    (pictures / "d").symlink_to(pictures.parent / "secret")
    return index


def row_of(index: Index, name: str) -> int:
    return next(row for row in range(len(index)) if index.path(row) == name)


def bomb() -> bytes:
    """A PNG file of a few hundred bytes that promises 40,000 × 40,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    )


@pytest.fixture(scope="module")
def client(shelf, retriever) -> TestClient:
    return TestClient(make_page(shelf, retriever), base_url="http://127.0.0.1:7860")


@pytest.fixture(scope="module")
def address(shelf, retriever) -> Iterator[tuple[str, int]]:
    with served(shelf, retriever) as address:
        yield address


@contextlib.contextmanager
def served(index: Index, retriever: Retriever) -> Iterator[tuple[str, int]]:
    """The page behind a real socket."""
    import uvicorn

    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(make_page(index, retriever), log_level="error", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield listening.getsockname()
    server.should_exit = True
    thread.join()
    listening.close()


def test_a_recording_is_answered_as_the_retriever_and_the_index_say(
    client, shelf, corpus, retriever
):
    for caption in corpus.captions[:5]:
        response = client.post("/search?how=recorded", content=caption.audio.read_bytes())
        scores = shelf.vectors @ retriever.embed_speech(caption.audio)
        results = response.json()["results"]
        rows = [one["row"] for one in results]
        assert rows == np.argsort(-scores, kind="stable")[:12].tolist()
        np.testing.assert_allclose([one["score"] for one in results], scores[rows], atol=1e-5)
        assert [one["name"] for one in results] == [shelf.path(row) for row in rows]


def test_a_typed_sentence_is_spoken_and_each_word_has_its_map(client):
    answer = client.post("/say", content=SAID).json()
    assert [word["word"] for word in answer["words"]] == SAID.split()
    sound, rate = soundfile.read(io.BytesIO(client.get(f"/sound/{answer['query']}").content))
    assert rate == 16_000
    assert len(sound) / rate == pytest.approx(answer["seconds"])
    row = answer["results"][0]["row"]
    steps = client.get(f"/map/{answer['query']}/{row}").json()["steps"]
    assert [step["word"] for step in steps] == SAID.split()
    assert np.shape([step["values"] for step in steps]) == (7, 8, 8)


def test_a_map_of_sound_covers_it_in_time(client, corpus):
    answer = client.post("/search", content=corpus.captions[0].audio.read_bytes()).json()
    found = client.get(f"/map/{answer['query']}/0").json()
    steps = found["steps"]
    assert steps[0]["start"] == 0
    assert steps[-1]["end"] == pytest.approx(found["seconds"], abs=0.11)
    for step, following in pairwise(steps):
        assert step["end"] == pytest.approx(following["start"])


def test_more_of_an_answer_begins_with_what_was_shown(client, shelf):
    answer = client.post("/say", content="a star").json()
    more = client.get(f"/answer/{answer['query']}?k=20").json()["results"]
    assert more[:12] == answer["results"]
    assert len(more) == min(20, len(shelf))
    for k in ("0", "121", "-1", "9" * 30, "many", "²"):
        assert client.get(f"/answer/{answer['query']}", params={"k": k}).status_code == 400


@pytest.mark.parametrize(
    "path",
    [
        "/picture/../secret.png",
        "/picture/%2e%2e%2fsecret.png",
        "/picture/..%5c..%5csecret.png",
        "/thumbnail//etc/passwd",
        "/picture/-1",
        "/picture/0.5",
        "/picture/999999999999999999999999",
        "/secret.png",
        "/serve.py",
        "/../serve.py",
        "/verdicts.jsonl",
        "/docs",
    ],
)
def test_nothing_but_indexed_pictures_is_reached(client, path):
    assert client.get(path).status_code == 404


def test_an_indexed_path_that_leads_out_of_the_folder_is_refused(spoilt, retriever):
    client = TestClient(make_page(spoilt, retriever), base_url="http://127.0.0.1:7860")
    for name in ("gone.png", "link.png", "d/in.png"):
        for kind in ("picture", "thumbnail"):
            assert client.get(f"/{kind}/{row_of(spoilt, name)}").status_code == 404


def test_a_picture_bomb_is_refused(spoilt, retriever):
    client = TestClient(make_page(spoilt, retriever), base_url="http://127.0.0.1:7860")
    query = client.post("/say", content="a star").json()["query"]
    row = row_of(spoilt, "bomb.png")
    for path in (f"/picture/{row}", f"/thumbnail/{row}", f"/map/{query}/{row}"):
        response = client.get(path)
        assert response.status_code == 400
        assert "pixels" in response.json()["error"]


def test_a_name_that_is_no_utf8_is_shown_all_the_same(spoilt, retriever):
    client = TestClient(make_page(spoilt, retriever), base_url="http://127.0.0.1:7860")
    results = client.post("/say", content="a star").json()["results"]
    assert "f\\xe9.png" in [one["name"] for one in results]
    row = row_of(spoilt, "f\udce9.png")
    assert client.get(f"/picture/{row}").status_code == 200


def test_pictures_are_sent_small_and_without_what_a_camera_wrote(client, shelf):
    row = row_of(shelf, f"{HOSTILE}.jpg")
    for kind, size in (("thumbnail", (320, 107)), ("picture", (900, 300))):
        response = client.get(f"/{kind}/{row}")
        picture = Image.open(io.BytesIO(response.content))
        assert picture.size == size
        assert b"Elm Street" not in response.content
        assert not picture.getexif()


def sound_file(seconds: float, rate: int = 8000) -> bytes:
    content = io.BytesIO()
    silence = np.zeros(int(seconds * rate), np.int16)
    soundfile.write(content, silence, rate, format="FLAC")
    return content.getvalue()


def test_a_ten_hour_file_is_refused(client):
    content = sound_file(36_000)
    assert len(content) < MAX_UPLOAD
    response = client.post("/search", content=content)
    assert response.status_code == 400
    assert "lasts over 60 s" in response.json()["error"]


@pytest.mark.parametrize(
    "content", [b"", b"RIFF", b"<html>", sound_file(1)[:60], Path(__file__).read_bytes()]
)
def test_what_is_no_sound_is_refused_in_words(client, content):
    response = client.post("/search", content=content)
    assert response.status_code == 400
    assert response.json()["error"].startswith("This is no sound")


@pytest.mark.parametrize("text", ["", "   ", "x" * 301, "\0", "…", "?!"])
def test_a_text_without_words_is_refused(client, text):
    assert client.post("/say", content=text.encode()).status_code == 400


def test_an_upload_that_states_2_gb_is_refused_unread(address):
    head = f"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {2 << 30}\r\n\r\n"
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(head.encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_an_upload_of_unstated_length_is_cut_off(address):
    head = b"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    block = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    sent = 0
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(head)
        with contextlib.suppress(ConnectionError):
            while sent < 2 << 30:
                connection.sendall(block)
                sent += 1 << 20
    assert sent < 4 * MAX_UPLOAD  # what the system's own buffers hold comes on top


FOREIGN = [
    {"Origin": "https://example.com"},
    {"Origin": "http://localhost:7860"},
    {"Origin": "http://127.0.0.1:3000"},
    {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Host": "example.com"},
    {"Host": "127.0.0.1.example.com:7860"},
    {"Host": "example.com:7860", "Origin": "http://example.com:7860"},
    {"Host": ""},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_another_site_or_host_is_refused_whatever_it_asks(client, shelf, headers):
    for method, path in (
        ("GET", "/"),
        ("GET", "/picture/0"),
        ("POST", "/say"),
        ("POST", "/verdict"),
    ):
        response = client.request(method, path, headers=headers, content=b"a star")
        assert response.status_code == 403
        assert "access-control-allow-origin" not in response.headers


def test_the_page_itself_and_a_user_s_own_hand_are_answered(client):
    own = {"Origin": "http://127.0.0.1:7860", "Sec-Fetch-Site": "same-origin"}
    assert client.post("/say", content=b"a star", headers=own).status_code == 200
    assert client.get("/", headers={"Sec-Fetch-Site": "none"}).status_code == 200
    assert client.get("/", headers={"Host": "localhost:7860"}).status_code == 200


def test_verdicts_are_logged_with_the_rank_that_the_answer_had(client, shelf):
    answer = client.post("/say", content="a blue star").json()
    query, third = answer["query"], answer["results"][2]
    ranks = []
    for said in ({"row": third["row"]}, {"rank": 17}, {"rank": None}):
        response = client.post("/verdict", json={"query": query} | said)
        ranks.append(response.json()["rank"])
    assert ranks == [3, 17, None]
    logged = read_verdicts(shelf.folder)[-3:]
    assert [verdict.rank for verdict in logged] == ranks
    assert [verdict.picture for verdict in logged] == [third["name"], None, None]
    assert {verdict.how for verdict in logged} == {"typed"}


@pytest.mark.parametrize(
    "said",
    [
        {"rank": 0},
        {"rank": 10_000},
        {"rank": True},
        {"rank": 1.5},
        {"row": -1},
        {"row": "0"},
        {"query": 3},
    ],
)
def test_a_verdict_that_cannot_be_is_refused_and_not_logged(client, shelf, said):
    query = client.post("/say", content="a blue star").json()["query"]
    client.post("/verdict", json={"query": query, "rank": 1})
    before = (shelf.folder / "verdicts.jsonl").read_bytes()
    assert client.post("/verdict", json={"query": query} | said).status_code == 400
    for content in (b"", b"[]", b"[" * 900, b"\xff", json.dumps({"query": "unknown"}).encode()):
        assert client.post("/verdict", content=content).status_code == 400
    assert (shelf.folder / "verdicts.jsonl").read_bytes() == before


# ---- in the browser ----


@pytest.fixture(scope="module")
def spoken(corpus, tmp_path_factory) -> Path:
    """A caption of the corpus as a microphone's 48 kHz, with a second of silence after it."""
    from scipy.signal import resample_poly

    sound, rate = soundfile.read(corpus.captions[0].audio)
    file = tmp_path_factory.mktemp("microphone") / "caption.wav"
    loud = np.concatenate([resample_poly(sound, 3, 1), np.zeros(48_000)])
    soundfile.write(file, np.clip(loud, -1, 1), 3 * rate, subtype="PCM_16")
    return file


@pytest.fixture(scope="module")
def browser(spoken):
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    flags = [
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={spoken}",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture(params=VIEWS, ids=lambda view: f"{view[0]} px, {view[1]}")
def opened(request, browser, address):
    """The page in one view, and all that it asked for elsewhere, printed or threw."""
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(20_000)
    home, seen = f"http://127.0.0.1:{address[1]}/", []
    own = (home, "data:")
    page.on("request", lambda one: None if one.url.startswith(own) else seen.append(one.url))
    page.on("console", lambda one: seen.append(f"console: {one.text}"))
    page.on("pageerror", lambda one: seen.append(f"error: {one}"))
    page.on("dialog", lambda one: seen.append(f"dialog: {one.message}"))
    page.goto(home)
    yield page, seen
    page.close()


def sound_and_seen(page) -> None:
    """Nothing for axe to find, and nothing that scrolls sideways."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response
    assert [(one["id"], one["nodes"][0]["html"]) for one in found["violations"]] == []
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_type_look_and_point_at_the_right_one(opened, shelf):
    page, seen = opened
    sound_and_seen(page)
    page.get_by_label("Or type it").fill(SAID)
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="What fits best").wait_for()
    assert page.locator("#grid li").count() == 12
    sound_and_seen(page)
    second = page.locator("#grid button").nth(1)
    second.focus()
    page.keyboard.press("Enter")
    star = page.locator("#words").get_by_role("button", name="star")
    star.click()
    assert star.get_attribute("aria-pressed") == "true"
    assert page.locator("#where").inner_text().startswith("“star” fits the ")
    sound_and_seen(page)
    frame, overlay = page.locator("#large").bounding_box(), page.locator("#overlay").bounding_box()
    assert overlay["width"] == pytest.approx(min(frame["width"], frame["height"]), abs=1.5)
    page.get_by_role("button", name="This is the one").click()
    page.get_by_text("Noted: it was number 2.").wait_for()
    page.keyboard.press("Escape")
    assert read_verdicts(shelf.folder)[-1].rank == 2
    assert second.evaluate("one => one === document.activeElement")
    assert seen == []


def test_more_pictures_and_one_not_found(opened, shelf):
    page, seen = opened
    page.get_by_label("Or type it").fill("a star")
    page.get_by_role("button", name="Say it").click()
    page.get_by_role("button", name="Show more pictures").click()
    page.locator("#grid li").nth(12).wait_for()
    names = [page.locator("#grid .name").nth(i).inner_text() for i in range(len(shelf))]
    assert f"{HOSTILE}.jpg" in names
    page.get_by_label("Number").fill("14")
    page.get_by_role("button", name="Note it").click()
    page.get_by_text("Noted: it was number 14.").wait_for()
    page.get_by_role("button", name="I did not find it").click()
    page.get_by_text("Noted: it was not found.").wait_for()
    assert [verdict.rank for verdict in read_verdicts(shelf.folder)[-2:]] == [14, None]
    assert seen == []


def test_a_dropped_file_and_a_refused_one(opened, corpus):
    page, seen = opened
    page.locator("#file").set_input_files(corpus.captions[1].audio)
    page.get_by_text(corpus.captions[1].audio.name).wait_for()
    page.locator("#grid button").first.click()
    page.get_by_label("Moment of the recording").press("End")
    page.get_by_text("The speech at").wait_for()
    sound_and_seen(page)
    page.get_by_role("button", name="Close").click()
    assert seen == []
    page.locator("#file").set_input_files(Path(__file__))
    page.get_by_text("This is no sound that libsndfile reads").wait_for()
    assert len(seen) == 1
    assert "status of 400" in seen[0]


def test_the_right_picture_comes_first_as_often_as_r_at_1_says(browser, corpus, tmp_path):
    """Two captions of each picture by the module that ships, each dropped as a file, against the
    figures of `cmdlab encode` and `cmdlab evaluate`."""
    module = "spoken-scenes-cmd"
    retriever = Retriever(module)
    pictures, index = tmp_path / "pictures", tmp_path / "index"
    pictures.mkdir()
    for image in corpus.images:
        shutil.copy(image.path, pictures)
    file_of = {image.id: f"pictures/{image.path.name}" for image in corpus.images}
    asked = [*corpus.captions[::5], *corpus.captions[1::5]]
    rows = []
    for caption in asked:
        shutil.copy(caption.audio, tmp_path)
        rows.append((caption.audio.name, file_of[caption.image_id]))
    with (tmp_path / "pairs.csv").open("w", newline="") as table:
        csv.writer(table).writerows([("audio", "image"), *rows])
    encode_pairs(retriever, tmp_path / "pairs.csv", tmp_path / "vectors.npz")
    vectors = np.load(tmp_path / "vectors.npz")
    best = (vectors["speech"] @ vectors["image"].T).argmax(axis=1)
    expected = [Path(vectors["image_id"][row]).name for row in best]
    r_at_1 = evaluate_file(tmp_path / "vectors.npz")["speech_to_image"]["R@1"]

    index_pictures(pictures, index, module, lambda: retriever, progress=False)
    with served(Index(index), retriever) as (host, port):
        page = browser.new_page()
        page.goto(f"http://{host}:{port}/")
        first = []
        for caption in asked:
            page.locator("#file").set_input_files(caption.audio)
            page.locator("#spoken", has_text=f"{caption.audio.name}, ").wait_for()
            first.append(page.locator("#grid .name").first.inner_text())
        page.close()
    assert first == expected
    right = [Path(image).name for _, image in rows]
    assert 100 * np.mean(np.array(first) == right) == pytest.approx(r_at_1)
    assert r_at_1 > 50  # of 20 pictures, chance finds 5


def test_what_the_microphone_hears_is_what_is_searched_for(browser, address, spoken, corpus):
    """The fake microphone plays a caption again and again. What is searched for is compared with
    the file, at the shift where they fit best."""
    from scipy.signal import correlate

    page = browser.new_page()
    page.set_default_timeout(20_000)
    page.goto(f"http://127.0.0.1:{address[1]}/")
    page.get_by_role("button", name="Record").click()
    page.get_by_role("button", name="Stop").wait_for()
    page.wait_for_timeout(1000 * (2 * soundfile.info(spoken).duration + 1))  # it is once whole
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("heading", name="What fits best").wait_for()
    source = page.locator("#sound").get_attribute("src")
    content = page.request.get(f"http://127.0.0.1:{address[1]}/{source}").body()
    page.close()
    heard, _ = soundfile.read(io.BytesIO(content))
    said, _ = soundfile.read(corpus.captions[0].audio)
    start = int(np.argmax(correlate(heard, said, mode="valid")))
    assert np.corrcoef(heard[start : start + len(said)], said)[0, 1] > 0.9
