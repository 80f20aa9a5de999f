"""Addresses with credentials: they fetch, nothing that is written holds them, and a renewed one is the same source."""

from __future__ import annotations

from pathlib import Path

import pytest
from tar_files import write_tar
from web_server import serving

from svd.core.errors import UserError
from svd.curation.measuring.fetching import local_file
from svd.sources.listing import list_sources, with_addresses
from svd.sources.source import Source
from svd.sources.stage import gather_footage

VIDEO = bytes(range(256)) * 400
LOGIN = "user:SECRET p@ss"


def gathered(patterns: list[str], folder: Path) -> tuple[list[Source], bytes]:
    """What curation sees, and all bytes that the stage `sources` wrote."""
    gather_footage(patterns, folder, 10**9)
    written = b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())
    return list_sources([str(folder)], folder.parent), written


def signed(address: str, path: str, signature: str) -> str:
    host = address.removeprefix("http://")
    return f"http://user:SECRET%20p%40ss@{host}/{path}?X-Amz-Date={signature}&X-Amz-Signature=SECRET{signature}"


def test_videos_and_tars_are_fetched_with_what_the_list_tells_today(tmp_path: Path) -> None:
    served, users = tmp_path / "served", tmp_path / "list.txt"
    served.mkdir()
    (served / "a.mp4").write_bytes(VIDEO)
    write_tar(served / "b.tar", {"b.mp4": VIDEO[::-1], "b.txt": b"a cat"})
    with serving(served, login=LOGIN) as (address, _):
        users.write_text("".join(f"{signed(address, name, '1')}\n" for name in ("a.mp4", "b.tar")))
        first, written = gathered([str(users)], tmp_path / "one" / "footage")
        assert b"SECRET" not in written
        assert [one.uri for one in first] == [f"{address}/a.mp4", f"{address}/b.tar#b.mp4"]
        users.write_text("".join(f"{signed(address, name, '2')}\n" for name in ("b.tar", "a.mp4")))
        again, renewed = gathered([str(users)], tmp_path / "two" / "footage")
        assert (again, renewed) == (first, written)
        for source, expected in zip(with_addresses(again, [str(users)]), (VIDEO, VIDEO[::-1]), strict=True):
            assert source.private and "SECRET" not in repr(source)
            with local_file(source, tmp_path / "fetched") as file:
                assert file.read_bytes() == expected
        refused = with_addresses(again, [str(users)])[0]
        (served / "a.mp4").unlink()
        with pytest.raises(FileNotFoundError) as caught, local_file(refused, tmp_path / "fetched"):
            pass
        assert str(caught.value) == f"{address}/a.mp4: no such file (404)"


def test_a_folder_with_a_list_of_credentials_is_not_copied(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "list.csv").write_text("url,poster\nhttps://h/a.mp4?sig=SECRET,https://h/a.jpg?w=9&token=SECRET\n")
    (folder / "b.mp4").write_bytes(VIDEO)
    found, written = gathered([str(folder)], tmp_path / "out")
    assert b"SECRET" not in written and len(found) == 2
    assert dict(found[0].metadata) == {"poster": "https://h/a.jpg?w=9"}
    assert [one.address for one in with_addresses(found, [str(folder)])] == ["https://h/a.mp4?sig=SECRET", None]


def test_what_names_a_video_tells_sources_apart_and_a_signature_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    patterns = [f"https://h/get?v={v}&token=SECRET{n}" for v, n in ((1, 1), (2, 2), (1, 3))]
    assert [one.uri for one in list_sources(patterns)] == ["https://h/get?v=1", "https://h/get?v=2"]
    (said,) = caplog.messages
    assert "1 addresses differ from others in credentials alone" in said and "(https://h/get?v=1)" in said
    by_key = [f"https://h/get?key=film{n}.mp4" for n in (1, 2)]
    assert [one.uri for one in list_sources(by_key)] == by_key
    found, written = gathered(patterns, tmp_path / "out")
    assert b"SECRET" not in written
    assert [one.address for one in with_addresses(found, patterns)] == patterns[:2]


def test_an_address_that_the_list_lost_is_one_line(tmp_path: Path) -> None:
    found, _ = gathered(["https://h/a.mp4?sig=SECRET", "https://h/b.mp4"], tmp_path / "out")
    with pytest.raises(UserError, match=r"no list there names 'https://h/a.mp4' any more"):
        with_addresses(found, ["https://h/b.mp4"])
    public = [one for one in found if not one.private]
    assert with_addresses(public, ["/nowhere"]) == public
