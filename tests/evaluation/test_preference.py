"""The study: fair pairs, balanced schedule, votes that survive, and the page over HTTP."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from evaluation.preference.app import build_app, clip_path
from evaluation.preference.clips import Box, ModelClips, cover_and_crop, harmonise, mask, spoil, trim
from evaluation.preference.pairs import schedule
from evaluation.preference.store import VoteStore
from evaluation.preference.study import create_study, export_results, load_study, open_store, read_named_prompts
from svd.core.errors import UserError
from svd.media.video import read_frames, write_mp4

MODELS = ("svd-alpha", "svd-beta", "svd-gamma")


def clip(seed: int, frames: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    base = rng.integers(40, 220, (1, height // 8, width // 8, 3), dtype=np.uint8)
    return np.repeat(np.repeat(np.repeat(base, 8, 1), 8, 2), frames, 0)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[ModelClips]:
    """Three models with clips of other sizes, rates and lengths; the second has a watermark."""
    root = tmp_path_factory.mktemp("clips")
    found = []
    for number, (model, size, fps, count) in enumerate(
        zip(MODELS, ((64, 96), (48, 96), (64, 64)), (8, 16, 8), (8, 12, 9), strict=True)
    ):
        for key in ("a cat", "dogs & “birds”"):
            write_mp4(root / model / f"{key}.mp4", clip(number, count, *size), fps)
        boxes = (Box(0.75, 0.75, 1, 1),) if model == "svd-beta" else ()
        found.append(ModelClips(model, root / model, boxes))
    return found


@pytest.fixture
def study(tmp_path: Path, sources: list[ModelClips]) -> Path:
    create_study(tmp_path / "study", sources, votes=2)
    return tmp_path / "study"


def test_every_pair_on_every_prompt_with_balanced_sides() -> None:
    questions = schedule(MODELS, ["p", "q"], votes=4, seed=3, check_every=0)
    assert len(questions) == 2 * 2 * 3 * 4
    content = Counter((q.prompt, q.axis, frozenset((q.left, q.right))) for q in questions)
    assert set(content.values()) == {4}
    sides = Counter((q.prompt, q.axis, q.left, q.right) for q in questions)
    assert set(sides.values()) == {2}
    assert questions == schedule(MODELS, ["p", "q"], votes=4, seed=3, check_every=0)
    assert questions != schedule(MODELS, ["p", "q"], votes=4, seed=4, check_every=0)
    assert [q.number for q in questions] == list(range(48))
    assert [q.prompt for q in questions] != sorted(q.prompt for q in questions)


def test_attention_checks_come_regularly_on_random_sides() -> None:
    questions = schedule(MODELS, [str(i) for i in range(16)], votes=3, seed=0, check_every=10)
    checks = [q for q in questions if q.check]
    assert abs(len(checks) - len([q for q in questions if not q.check]) / 10) <= 1
    assert all(q.left == q.right for q in checks) and {q.check for q in checks} == {"left", "right"}
    with pytest.raises(ValueError, match="two models"):
        schedule(["one"], ["p"])
    with pytest.raises(ValueError, match="appears twice"):
        schedule(["one", "one"], ["p"])


def test_gen2_clips_become_1024_by_576() -> None:
    made = cover_and_crop(clip(0, 2, 768, 1408), 576, 1024)
    assert made.shape == (2, 576, 1024, 3)


def test_pairs_get_one_length_one_size_and_all_masks() -> None:
    clips = {"a": (clip(0, 32, 64, 96), 8.0), "b": (clip(1, 48, 96, 160), 16.0)}
    made = harmonise(clips, [Box(0.5, 0.5, 1, 1)])
    assert made["a"][0].shape == (24, 64, 96, 3) and made["b"][0].shape == (48, 64, 96, 3)
    for frames, _ in made.values():
        assert (frames[:, 32:, 48:] == 0).all() and (frames[:, :32] > 0).any()
    assert (clips["a"][0][:, 32:, 48:] > 0).all()
    assert len(trim(clips["a"][0], 8, 3.0)) == 24 and len(trim(clips["a"][0], 8, 0.01)) == 1
    assert mask(clips["a"][0], []).tobytes() == clips["a"][0].tobytes()


def test_a_spoiled_clip_is_plainly_worse_and_reproducible() -> None:
    frames = clip(0, 8, 64, 96)
    assert np.array_equal(spoil(frames, 1), spoil(frames, 1))
    assert np.abs(spoil(frames, 1).astype(int) - frames).mean() > 40


def test_study_folder_is_complete_and_repeatable(study: Path, sources: list[ModelClips]) -> None:
    made = load_study(study)
    assert made.models == MODELS and set(made.prompts) == {"a cat", "dogs & “birds”"}
    shapes = set()
    for key in made.prompts:
        for number in range(3):
            frames, fps = read_frames(study / "clips" / key / f"{number}.mp4")
            shapes.add((frames.shape[1:], round(len(frames) / fps, 2)))
            assert (frames[:, -frames.shape[1] // 5 :, -frames.shape[2] // 5 :] < 30).all()
    assert shapes == {((64, 64, 3), 0.75)}
    before = {p: p.stat().st_mtime_ns for p in study.rglob("*.mp4")}
    assert create_study(study, sources, votes=2) == made
    assert {p: p.stat().st_mtime_ns for p in study.rglob("*.mp4")} == before
    with pytest.raises(UserError, match="another study"):
        create_study(study, sources, votes=3)


def test_a_file_beside_a_clip_is_no_clip(tmp_path: Path) -> None:
    for model in "ab":
        write_mp4(tmp_path / model / "x [1].mp4", clip(ord(model), 4, 32, 48), 8)
        (tmp_path / model / "x [1].json").write_text("{}")
    made = create_study(tmp_path / "study", [ModelClips(model, tmp_path / model) for model in "ab"], votes=1)
    assert set(made.prompts) == {"x [1]"} and (tmp_path / "study" / "clips" / "x [1]" / "1.mp4").is_file()


def test_another_watermark_is_another_study(study: Path, sources: list[ModelClips]) -> None:
    """Else the clips on disk would keep the old mask."""
    wider = [*sources[:2], ModelClips(MODELS[2], sources[2].folder, (Box(0, 0, 0.2, 0.2),))]
    with pytest.raises(UserError, match="another study"):
        create_study(study, wider, votes=2)
    with pytest.raises(UserError, match="not in the picture"):
        Box(0.9, 0.5, 0.8, 1)


def test_a_page_whose_study_was_replaced_says_so(study: Path) -> None:
    client = TestClient(build_app(study), base_url="http://127.0.0.1")
    client.get("/?rater=worker-0003")
    about = json.loads((study / "study.json").read_text())
    (study / "study.json").write_text(json.dumps({**about, "votes_file": "../other.db"}))
    assert client.get("/api/next").status_code == 409
    (study / "study.json").unlink()
    assert client.get("/api/next").status_code == 503


def test_prompts_from_files(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"a": "A cat", "b": "A dog"}')
    (tmp_path / "p.csv").write_text('\ufeffname,prompt\na,A cat\nb,"A dog, running"\n')
    assert read_named_prompts(tmp_path / "p.json") == {"a": "A cat", "b": "A dog"}
    assert read_named_prompts(tmp_path / "p.csv") == {"a": "A cat", "b": "A dog, running"}
    for content, message in (("x,y\n1,2\n", "no column 'name'"), ("name,prompt\na,\n", "needs a text")):
        (tmp_path / "bad.csv").write_text(content)
        with pytest.raises(UserError, match=message):
            read_named_prompts(tmp_path / "bad.csv")
    for content in ("[1]", "{", "3"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match="no prompts"):
            read_named_prompts(tmp_path / "bad.json")
    with pytest.raises(UserError, match="no prompts"):
        read_named_prompts(tmp_path / "absent.json")


def test_mistakes_in_a_study_are_one_line(tmp_path: Path, sources: list[ModelClips]) -> None:
    with pytest.raises(UserError, match="no clip of this prompt by svd-alpha"):
        create_study(tmp_path / "a", sources, {"absent": "An absent clip"})
    with pytest.raises(UserError, match="is no file name"):
        create_study(tmp_path / "a", sources, {"../outside": "x"})
    with pytest.raises(UserError, match="same name in all"):
        create_study(tmp_path / "b", [sources[0], ModelClips("x", tmp_path)])
    with pytest.raises(UserError, match="appears twice"):
        create_study(tmp_path / "c", [sources[0], sources[0]])
    with pytest.raises(UserError, match="no study there"):
        build_app(tmp_path / "absent")
    for url in ("nonsense", "sqlite:////absent/folder/votes.db", "oracle+nothing://u:secret@h/db"):
        with pytest.raises(UserError, match="can't be opened") as error:
            VoteStore(url)
        assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_a_rater_votes_over_http_until_nothing_is_left(study: Path) -> None:
    client = TestClient(build_app(study), base_url="http://127.0.0.1")
    assert client.get("/api/next").status_code == 403
    page = client.get("/?rater=worker-0001")
    assert page.status_code == 200 and "ArrowLeft" in page.text
    assert not any(model in page.text for model in MODELS)
    seen = []
    while not (shown := client.get("/api/next").json())["done"]:
        assert not any(model in json.dumps(shown) for model in MODELS) and "check" not in shown
        for side in ("left", "right"):
            answer = client.get(shown[side])
            assert answer.status_code == 200 and answer.headers["content-type"] == "video/mp4"
        body = {"question": shown["question"], "side": "left", "milliseconds": 900}
        assert client.post("/api/vote", json=body).status_code == 201
        again = client.post("/api/vote", json={**body, "side": "right"})
        assert again.status_code == 200 and again.json() == {"stored": False}
        seen.append(shown["question"])
    store = open_store(study)
    real = [q for q in store.questions() if not q.check]
    assert len(real) == 24 and len(set(seen)) == len(seen)
    assert len(store.votes(checked=False)) == 12, "one of the two copies of each question"


def test_bad_requests_are_answered_and_nothing_is_stored(study: Path) -> None:
    client = TestClient(build_app(study), base_url="http://127.0.0.1")
    client.get("/?rater=worker-0002")
    assert client.post("/api/vote", json={"question": 9999, "side": "left"}).status_code == 404
    assert client.post("/api/vote", json={"question": 0, "side": "both"}).status_code == 422
    assert client.post("/api/vote", json={"question": 0, "side": "left", "milliseconds": -1}).status_code == 422
    assert client.get("/clips/9999/left.mp4").status_code == 404
    assert client.get("/clips/0/..%2Fstudy.json").status_code in (404, 422)
    assert open_store(study).export() == []


def test_questions_are_shared_out_evenly_between_raters(study: Path) -> None:
    app = build_app(study)
    store = open_store(study)
    for rater in ("rater-one", "rater-two"):
        client = TestClient(app, base_url="http://127.0.0.1")
        client.get(f"/?rater={rater}")
        while not (shown := client.get("/api/next").json())["done"]:
            client.post("/api/vote", json={"question": shown["question"], "side": "right"})
    answered = Counter(row["question"] for row in store.export() if not row["check"])
    assert set(answered.values()) == {1} and len(answered) == 24


def test_raters_that_fail_checks_are_left_out(study: Path) -> None:
    store = open_store(study)
    checks = [q for q in store.questions() if q.check]
    real = [q for q in store.questions() if not q.check]
    assert checks
    wrong = {"left": "right", "right": "left"}
    for question in checks:
        store.answer(question.number, "careful", question.check, 1)
        store.answer(question.number, "careless", wrong[question.check], 1)
    for rater in ("careful", "careless"):
        store.answer(real[0].number, rater, "left", 1)
    assert store.inattentive() == {"careless"}
    assert [v.rater for v in store.votes()] == ["careful"]
    assert len(store.votes(checked=False)) == 2
    question = checks[0]
    study_values = load_study(study)
    right, spoiled = (clip_path(study_values, study, question, s) for s in (question.check, wrong[question.check]))
    assert spoiled.name == right.name.replace(".mp4", "-spoiled.mp4") and spoiled.is_file()


def test_results_and_exports(study: Path) -> None:
    store = open_store(study)
    client = TestClient(build_app(study), base_url="http://127.0.0.1")
    assert "No votes that count yet" in client.get("/results").text
    strength = {model: -number for number, model in enumerate(MODELS)}
    for question in store.questions():
        side = "left" if strength[question.left] >= strength[question.right] else "right"
        store.answer(question.number, "a-rater", question.check or side, 1200)
    found = export_results(study)
    for axis in ("quality", "prompt"):
        table = found["axes"][axis]
        assert [r["model"] for r in table["bradley_terry"]] == list(MODELS) == [r["model"] for r in table["elo_paper"]]
        assert table["votes"] == 12 and table["agreement"] == 1.0
    assert [r["model"] for r in found["aggregated"]["bradley_terry"]] == list(MODELS)
    assert json.loads((study / "ratings.json").read_text()) == json.loads(json.dumps(found))
    rows = list(csv.DictReader((study / "ratings.csv").open()))
    assert len(rows) == 3 * 2 * 3 and {row["axis"] for row in rows} == {"quality", "prompt", "aggregated"}
    with Image.open(study / "ratings.png") as plot:
        assert plot.width > 600 and len(plot.convert("RGB").getcolors(1 << 20) or []) > 20
    page = client.get("/results").text
    assert all(model in page for model in MODELS) and "95 % interval" in page
    votes = list(csv.DictReader(io.StringIO(client.get("/export/votes.csv").text)))
    assert len(votes) == len(store.export()) == len(client.get("/export/votes.json").json())


def test_votes_are_there_after_a_restart_and_two_writers_do_not_collide(study: Path) -> None:
    one, two = open_store(study), open_store(study)
    for question in one.questions()[:6]:
        assert one.answer(question.number, "one", "left", 1) and two.answer(question.number, "two", "right", 1)
    assert len(open_store(study).export()) == 12
