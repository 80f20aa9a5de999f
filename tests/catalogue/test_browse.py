"""The browser page: what it serves, what thresholds do, what it saves; and the page itself in a headless browser."""

from __future__ import annotations

import contextlib
import io
import shutil
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
import uvicorn
import yaml
from catalogue_inputs import write_catalogue
from fastapi.testclient import TestClient

from svd.catalogue import tables
from svd.catalogue.browser.app import create_app, transcode
from svd.config.load import preset_path
from svd.core.errors import UserError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CONFIG = {"min_motion": {"absolute": 0.35}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_catalogue(tmp_path_factory.mktemp("catalogue") / "out", config=CONFIG)


@pytest.fixture
def preset(tmp_path):
    return Path(shutil.copy(preset_path("tiny"), tmp_path / "mine.yaml"))


@pytest.fixture
def client(folder, preset):
    return TestClient(create_app(folder, preset), base_url="http://127.0.0.1")


def ask(client, **query):
    response = client.post("/api/clips", json=query)
    assert response.status_code == 200, response.text
    return response.json()


def test_the_page_carries_histograms_and_current_thresholds(client):
    page = client.get("/").text
    assert '"thresholds": {"motion": 0.35}' in page
    assert '"name": "motion"' in page and '"name": "text_area"' in page and '"name": "nsfw"' not in page


def test_moving_a_threshold_shows_what_it_keeps_and_drops(client):
    answer = ask(client, thresholds={"motion": 0.35})
    assert (answer["kept"], answer["dropped"], answer["axes"]["motion"]["drops"]) == (8, 4, 4)
    answer = ask(client, thresholds={"motion": 0.35, "text_area": 0.07}, show="dropped", sort="motion_score")
    dropped = [clip["clip_id"] for clip in answer["clips"]]
    assert answer["kept"] == 4 and answer["axes"]["text_area"]["drops"] == 8
    assert dropped == [f"clip{i:02d}" for i in range(8)]
    assert answer["clips"][0]["reason"] == "motion 0.0 < 0.35; text_area 0.2 > 0.07"
    assert all(not clip["keep"] for clip in answer["clips"])
    assert ask(client)["kept"] == 12


def test_sorting_puts_missing_scores_last_and_search_looks_at_captions(client):
    for descending in (False, True):
        scores = [c["aesthetics"] for c in ask(client, sort="aesthetics", descending=descending)["clips"]]
        present = [s for s in scores if s is not None]
        assert scores[len(present) :] == [None] * 3
        assert present == sorted(present, reverse=descending)
    assert [c["clip_id"] for c in ask(client, search="NUMBER 11")["clips"]] == ["clip11"]
    assert ask(client, search="video0.mp4")["matching"] == 3


def test_clips_are_served_whole_and_in_parts(client, folder):
    whole = client.get("/clips/clip03.mp4")
    with av.open(io.BytesIO(whole.content)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 12
    part = client.get("/clips/clip03.mp4", headers={"Range": "bytes=10-19"})
    assert part.status_code == 206 and part.content == whole.content[10:20]
    assert part.headers["content-range"] == f"bytes 10-19/{len(whole.content)}"
    tail = client.get("/clips/clip03.mp4", headers={"Range": "bytes=-5"})
    assert tail.content == whole.content[-5:]
    assert client.get("/clips/clip03.mp4", headers={"Range": "bytes=99999999-"}).status_code == 416
    assert client.get("/clips/clip03.jpg").content.startswith(b"\xff\xd8")
    assert client.get("/clips/nosuch.mp4").status_code == 404


def test_a_codec_that_browsers_cannot_play_is_transcoded(tmp_path):
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for level in range(0, 200, 20):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(io.BytesIO(transcode(target.getvalue()))) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        levels = [int(frame.to_ndarray(format="rgb24").mean()) for frame in container.decode(video=0)]
    assert np.allclose(levels, range(0, 200, 20), atol=6)


def test_saving_keeps_the_comments_of_the_preset(client, preset):
    before = preset.read_text()
    thresholds = {"motion": 0.123456789, "text_area": 0.05}
    answer = client.post("/api/save", json={"thresholds": thresholds, "touched": [*thresholds, "similarity"]})
    assert answer.json() == {"saved": "mine.yaml"}
    after = preset.read_text()
    assert yaml.safe_load(after)["curation"]["filters"] == {
        "min_motion": {"absolute": 0.123457},
        "max_text_area": {"absolute": 0.05},
    }
    comments = [line.split("#", 1)[1] for line in before.splitlines() if "#" in line]
    assert comments and all(comment in after for comment in comments)
    everything = yaml.safe_load(before)
    everything["curation"]["filters"] = yaml.safe_load(after)["curation"]["filters"]
    assert yaml.safe_load(after) == everything


def test_saving_leaves_what_nobody_touched(client, preset):
    before = yaml.safe_load(preset.read_text())["curation"]["filters"]
    shown = {"motion": 0.35, "text_area": 0.05}
    client.post("/api/save", json={"thresholds": shown, "touched": []})
    assert yaml.safe_load(preset.read_text())["curation"]["filters"] == before
    client.post("/api/save", json={"thresholds": shown, "touched": ["text_area"]})
    saved = before | {"max_text_area": {"absolute": 0.05}}
    assert "quantile" in before["min_motion"]
    assert yaml.safe_load(preset.read_text())["curation"]["filters"] == saved


def test_mistakes_are_explained(client, folder, preset, tmp_path):
    before = preset.read_text()
    assert "unknown axis speed" in client.post("/api/clips", json={"thresholds": {"speed": 1}}).text
    assert "can't sort by 'colour'" in client.post("/api/clips", json={"sort": "colour"}).text
    answer = client.post("/api/save", json={"thresholds": {"speed": 1}, "touched": ["speed"]})
    assert answer.status_code == 422 and "unknown axis speed" in answer.text
    assert preset.read_text() == before
    answer = TestClient(create_app(folder), base_url="http://127.0.0.1").post(
        "/api/save", json={"thresholds": {}, "touched": []}
    )
    assert answer.status_code == 409 and "--preset" in answer.text
    with pytest.raises(UserError, match="no clip catalogue"):
        create_app(tmp_path)


def test_another_site_cannot_read_or_write_under_its_own_name(client):
    for answer in (
        client.get("/", headers={"Host": "evil.example"}),
        client.post("/api/save", json={"thresholds": {}}, headers={"Host": "evil.example"}),
    ):
        assert answer.status_code == 421


@contextlib.contextmanager
def serve(app):
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def address(folder, preset):
    with serve(create_app(folder, preset)) as address:
        yield address


@pytest.mark.slow
def test_the_page_first_shows_what_the_catalogue_says(tmp_path):
    """A threshold is that of a clip to the last bit; sliders round, and must not drop that clip."""
    from playwright.sync_api import expect, sync_playwright

    out = write_catalogue(
        tmp_path / "out", config={"min_aesthetics": {"quantile": 0.3}, "min_motion": {"quantile": 0.3}}
    )
    clips = tables.read_clips(out)
    with serve(create_app(out)) as address, sync_playwright() as play:
        page = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]).new_page()
        page.goto(address)
        expect(page.locator("#kept")).to_have_text(str(int(clips["keep"].sum())))
        for axis in ("motion", "aesthetics"):
            dropped = int((~clips[f"pass_{axis}"]).sum())
            expect(page.locator(f"#drops-{axis}")).to_have_text(f"drops {dropped} on its own")


@pytest.mark.slow
def test_dragging_a_threshold_in_a_browser(address, preset, folder):
    """Needs a Chromium: playwright's own or the system's (`apt-get install chromium`)."""
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        expect(page.locator("#kept")).to_have_text("8")
        expect(page.locator(".clip.dropped")).to_have_count(4)
        slider = page.locator("#threshold-motion")
        box = slider.bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + 0.32 * box["width"], box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + box["height"] / 2, steps=5)
        page.mouse.up()
        value = float(slider.input_value())
        kept = int((tables.read_clips(folder)["motion_score"] >= value).sum())
        assert 0 < kept < 8
        expect(page.locator("#kept")).to_have_text(str(kept))
        page.select_option("#show", "dropped")
        expect(page.locator(".clip")).to_have_count(12 - kept)
        page.select_option("#sort", "motion_score")
        expect(page.locator(".clip .reason").first).to_contain_text("motion 0.0 <")
        page.fill("#search", "number 2")
        expect(page.locator(".clip")).to_have_count(1)
        video = page.locator(".clip video").first
        assert video.evaluate("v => { v.play(); return new Promise(r => v.onplaying = () => r(v.videoWidth)); }") == 96
        page.click("#save")
        expect(page.locator("#message")).to_have_text("Saved to mine.yaml")
        saved = yaml.safe_load(preset.read_text())["curation"]["filters"]
        assert saved["min_motion"]["absolute"] == pytest.approx(value, rel=1e-4)
        assert saved["min_similarity"] == {"quantile": 0.125}, "an axis that nobody touched"
        assert errors == []
        browser.close()
