"""How much of a half-broken file was decoded stands in its row."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from media_files import Kind, shots, tiny_config, write

from svd.curation.measuring import rows
from svd.curation.measuring.parts import analyse_part, count_parts
from svd.curation.merge import join_parts


@pytest.mark.parametrize(
    "kind", [Kind(gop=12, container_options={"movflags": "+faststart"}), Kind("mkv", gop=12)], ids=["mp4", "mkv"]
)
def test_the_share_of_the_declared_duration(tmp_path: Path, kind: Kind) -> None:
    whole, config = write(tmp_path / "whole", list(shots([120])), kind=kind), tiny_config(part_seconds=2.5)
    cut = tmp_path / f"cut.{kind.suffix}"
    data = whole.read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    found = {path: analyse_part(path, config, lambda clip: clip, (0, 1), None).facts for path in (whole, cut)}
    shares = {path: facts.decoded_share or 0.0 for path, facts in found.items()}
    assert shares[whole] == pytest.approx(1, abs=0.02) and shares[cut] == pytest.approx(0.5, abs=0.2)
    assert shares[cut] == pytest.approx(found[cut].frames / 120, abs=0.02)
    assert rows.of_facts(found[whole])["warnings"] == []
    assert f"only {shares[cut]:.0%} of the duration" in rows.of_facts(found[cut])["warnings"][-1]
    count = count_parts(whole, config)
    parts = [analyse_part(whole, config, lambda clip: clip, (n, count), tmp_path / "part.mp4") for n in range(count)]
    assert count == 2 and [part.facts.decoded_share for part in parts] == pytest.approx([1, 1], abs=0.03)


def test_parts_share_their_mean() -> None:
    columns = {"duration": [1.0, 3.0], "frames": [24, 72], "cuts": [0, 0], "clips": [1, 1], "fps": [24.0, 24.0]}
    texts = {"source_uri": ["a", "a"], "verdict": ["ok", "ok"], "reason": ["", ""], "warnings": [[""], [""]]}
    joined = join_parts(pl.DataFrame(columns | texts | {"decoded_share": [0.2, 1.0]}))
    assert joined["decoded_share"].to_list() == pytest.approx([0.8])
