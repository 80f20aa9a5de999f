"""The report: self-contained, complete, deterministic; what is missing is said; published numbers are marked."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from toy_outputs import write_outputs

from evaluation.report import gather
from evaluation.report.charts import Bar, Dot, Series, dot_plot, funnel_chart, line_chart, ticks
from evaluation.report.gather import continued, gallery, medium
from evaluation.report.page import figure, render_page, run
from flows.stages import find_stage
from svd.config.load import load_preset
from svd.core.errors import UserError
from svd.media.video import write_png
from svd.stage import StageContext


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_outputs(tmp_path_factory.mktemp("outputs"))


@pytest.fixture(scope="module")
def page(folders: dict[str, Path]) -> str:
    return render_page(load_preset("tiny"), folders)[0]


class Balance(HTMLParser):
    """Collects unclosed tags and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs) -> None:
        self.addresses += [value for key, value in attrs if key in ("src", "href") and value]
        if tag not in ("meta", "img", "link", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_it_is_one_well_formed_file_without_outside_addresses(page: str) -> None:
    parser = Balance()
    parser.feed(page)
    assert not parser.open
    assert all(a.startswith(("data:", "#")) for a in parser.addresses)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert "<script" not in page


def test_every_part_is_there(page: str) -> None:
    assert page.count('<video src="data:video/mp4') == 4 * 2 + 5 * 2 * 2 - 4 + 4 + 1
    assert page.count("<polyline") == 2 * 6 + 5, "a dashed line for the linear filter beside each training"
    for text in (
        "after motion",
        "Autoencoder reconstruction",
        "16.2 dB",
        "mean view 14.4",
        "real against real (half) 12.3 · mean frame 136.3",
        "-71 %",
        "contact sheet",
        "6 / 6",
        "98.7 %",
        "100.0 % precision",
    ):
        assert text in page, text
    assert "Not in this report" not in page
    assert "This is not FVD" in page


def claim_lines(page: str) -> list[list[str]]:
    """The cells of each line of the section of claims."""
    lines = re.findall(r'<div class="claim" role="row">(.*?)</div>', page, re.S)
    return [
        [
            re.sub(r"<[^>]*>", "", cell).strip()
            for cell in re.findall(r"<span role.*?</span>\s*(?=<span role|$)", line, re.S)
        ]
        for line in lines
    ]


def test_every_claim_has_its_control_margin_and_verdict(page: str) -> None:
    lines = claim_lines(page)
    linear = [line for line in lines if line[2] == "the best linear filter"]
    assert len(linear) == 5 and all(
        line[1:] == ["0.285", "the best linear filter", "0.31", "+5.2", "32", "shown"] for line in linear
    )
    starts = [line for line in lines if line[2] == "the network it started from"]
    assert len(starts) == 3 and all(line[4:] == ["+1.2", "32", "not shown"] for line in starts)
    (colour,) = [line for line in lines if "colour" in line[0]]
    assert colour[1] == "94 % [80–98]" and colour[3] == "25 %" and colour[5:] == ["32", "shown"]
    assert [line[2] for line in lines if "nearer to real" in line[0]] == ["untrained", "mean frame", "noise"]
    assert [line[6] for line in lines if "later frames" in line[0]] == ["not shown"]
    shown = sum(line[6] == "shown" for line in lines)
    assert f'<span class="big">{shown} / {len(lines)}</span>' in page and len(lines) == 14


def test_claims_that_need_what_is_missing_are_left_out(folders: dict[str, Path]) -> None:
    page, found = render_page(load_preset("tiny"), {"video-pretraining": folders["video-pretraining"]})
    assert [group.title for group in found.claims] == ["Video pretraining"] and len(claim_lines(page)) == 1
    none, _ = render_page(load_preset("tiny"), {})
    assert "claims shown" not in none and 'id="claims"' not in none


def test_text_from_outside_is_escaped(page: str) -> None:
    assert "a &lt;b&gt;red&lt;/b&gt; ring &amp; disc" in page and "<b>red</b>" not in page


def test_published_rows_are_marked_and_apart(page: str) -> None:
    tables = re.findall(r"<table.*?</table>", page, re.S)
    for table in tables:
        published = "242.02" in table or "16.83" in table
        assert published == ('class="published"' in table)
        if published:
            assert table.count('<span class="tag paper">paper</span>') == table.count("<tr>") - 1


def test_equal_inputs_give_an_equal_page(page: str, folders: dict[str, Path], tmp_path: Path) -> None:
    context = StageContext(load_preset("tiny"), folders, tmp_path / "report", tmp_path / "work")
    report = run(context)
    assert (tmp_path / "report" / "report.html").read_text() == page
    assert report.metrics["missing_parts"] == 0 and report.metrics["bytes"] == len(page.encode())
    assert str(tmp_path / "report" / "report.html") in report.summary


def test_the_page_shows_exactly_what_its_stage_reads(folders: dict[str, Path]) -> None:
    """Nothing that the pipeline never hands over is called missing."""
    assert set(gather.STAGES) == set(find_stage("report").inputs) == set(folders)


def test_missing_parts_are_said(folders: dict[str, Path]) -> None:
    some = {name: folder for name, folder in folders.items() if name in ("curation", "video-pretraining")}
    page, found = render_page(load_preset("tiny"), some)
    assert "Not in this report" in page
    assert len([part for part in found.missing if part.endswith("the stage has no output")]) == len(folders) - 2
    for text in (
        "UCF-101 score and generated clips: ucf101-evaluation/result.json is missing",
        "No multi-view scores",
        "No reconstruction",
        "High-quality finetuning: the stage has no output",
    ):
        assert text in page
    assert "242.02" in page and "after motion" in page
    empty, _ = render_page(load_preset("tiny"), {})
    assert "No stage has written metrics" in empty and "No loss curves" in empty


def test_damaged_inputs_name_the_file(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "funnel.json").write_text("{")
    with pytest.raises(UserError, match=r"funnel\.json: damaged"):
        render_page(load_preset("tiny"), {"curation": tmp_path})
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"x\.png: can't be shown"):
        medium(tmp_path / "x.png")


def test_galleries_keep_to_their_budget_and_large_pictures_shrink(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 2400, 3), dtype=np.uint8)
    write_png(tmp_path / "wide.png", noise)
    assert medium(tmp_path / "wide.png").uri.startswith("data:image/webp")
    assert len(medium(tmp_path / "wide.png").uri) < 0.7 * (tmp_path / "wide.png").stat().st_size
    assert gallery(tmp_path, 10_000) is None
    shown = gallery(tmp_path, 10_000_000)
    assert shown is not None and [m.caption for m in shown.media] == ["wide"]


def test_charts_show_their_numbers() -> None:
    points = tuple((float(i), 1.0 / (1 + i)) for i in range(50))
    svg = line_chart(
        [Series("train", points, "train"), Series("val", ((0.0, 1.0), (49.0, float("nan"))), "validation")], "l"
    )
    assert svg.count("<polyline") == 2 and svg.count("<circle") == 1 and "nan" not in svg
    with pytest.raises(ValueError, match="no finite points"):
        line_chart([Series("x", ((0.0, float("nan")),), "train")], "l")
    svg = funnel_chart([Bar("all", 200), Bar("left", 50, "<note>")], "f")
    widths = [float(w) for w in re.findall(r'<rect [^>]*width="([\d.]+)"', svg)]
    assert widths[1] == pytest.approx(widths[0] / 4, abs=0.1) and "(25 %)" in svg and "&lt;note&gt;" in svg
    svg = dot_plot([Dot("far", 100.0, 5.0), Dot("near", 1.0, 0.1, True)], "d", "x")
    assert svg.index("near") < svg.index("far")
    with pytest.raises(ValueError, match="no positive"):
        dot_plot([Dot("x", 0.0)], "d", "x")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0, 300, [0, 100, 200, 300]),
        (0.21, 0.47, [0.25, 0.3, 0.35, 0.4, 0.45]),
        (2, 2, [2]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_steps_go_on_over_phases() -> None:
    assert continued([0, 1, 2, 0, 1, 0]) == [0, 1, 2, 3, 4, 5]
    assert continued([0, 10, 10, 20]) == [0, 10, 10, 20]


def test_figures_for_people() -> None:
    shown = [figure(v) for v in (1234567, "0.123456", None, "", "text", 0.5, 3.0)]
    assert shown == ["1,234,567", "0.1235", "–", "–", "text", "0.5", "3"]
