"""Throughput of svd/storage.py beside boto3's own transfer manager and SeaweedFS's own client, on one local server.

    python -m benchmarks.storage --megabytes 256 --repeats 3

Prints a table and writes benchmarks' usual JSON with --output. Ratios are medians over `repeats` of interleaved runs,
relative to boto3 (above 1: faster). svd/storage.py computes and verifies a SHA-256 in both directions, the others
don't; `boto3 + sha256` does the same around boto3, which is the fair comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import boto3
from boto3.s3.transfer import TransferConfig

from svd import s3, storage

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from servers import BIN, S3Server

Action = Callable[[], object]
CONFIG = TransferConfig(multipart_threshold=s3.PART, multipart_chunksize=s3.PART, max_concurrency=s3.THREADS)


def boto_client(server: S3Server) -> object:
    """A plain boto3 client with its default retries."""
    session = boto3.Session(server.key, server.secret, region_name="us-east-1")
    return session.client("s3", endpoint_url=server.url)


def weed(server: S3Server, *arguments: str) -> None:
    """Run SeaweedFS's own client."""
    subprocess.run([str(BIN / "weed"), *arguments], check=True, capture_output=True)


def actions(server: S3Server, path: Path, back: Path) -> dict[str, tuple[Action, Action]]:
    """(upload, download) by name of the client."""
    client = boto_client(server)
    filer = f"http://127.0.0.1:{server.filer}/buckets/bench/weed/"

    def checked_upload() -> None:
        digest = storage.sha256(path)
        client.upload_file(str(path), "bench", "checked", Config=CONFIG, ExtraArgs={"Metadata": {"sha256": digest}})

    def checked_download() -> None:
        client.download_file("bench", "checked", str(back), Config=CONFIG)
        assert storage.sha256(back) == client.head_object(Bucket="bench", Key="checked")["Metadata"]["sha256"]

    return {
        "svd.storage": (
            lambda: storage.upload(path, "s3://bench/svd"),
            lambda: storage.download("s3://bench/svd", back),
        ),
        "boto3": (
            lambda: client.upload_file(str(path), "bench", "boto3", Config=CONFIG),
            lambda: client.download_file("bench", "boto3", str(back), Config=CONFIG),
        ),
        "boto3 + sha256": (checked_upload, checked_download),
        "weed": (
            lambda: weed(server, "filer.copy", str(path), filer),
            lambda: weed(server, "filer.cat", "-o", str(back), f"{filer}{path.name}"),
        ),
    }


def measure(server: S3Server, folder: Path, megabytes: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each repeat by client and direction; the clients take turns, so that load hits all of them."""
    path, back = folder / "file", folder / "back"
    path.write_bytes(os.urandom(1 << 20) * megabytes)
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(repeats + 1):
        for name, pair in actions(server, path, back).items():
            for direction, action in zip(("upload", "download"), pair, strict=True):
                start = time.perf_counter()
                action()
                found.setdefault(name, {}).setdefault(direction, []).append(time.perf_counter() - start)
            assert storage.sha256(back) == storage.sha256(path), name
    return {name: {d: seconds[1:] for d, seconds in both.items()} for name, both in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        server = S3Server(Path(name) / "server")
        os.environ.update(server.environment())
        server.start()
        try:
            server.make_bucket("bench")
            seconds = measure(server, Path(name), options.megabytes, options.repeats)
        finally:
            server.stop()
    rows = {
        client: {
            direction: {
                "MB/s": options.megabytes / statistics.median(times),
                "of boto3": statistics.median(seconds["boto3"][direction]) / statistics.median(times),
            }
            for direction, times in both.items()
        }
        for client, both in seconds.items()
    }
    for client, both in rows.items():
        cells = "   ".join(f"{d} {v['MB/s']:7.0f} MB/s ({v['of boto3']:.2f} x boto3)" for d, v in both.items())
        print(f"{client:16}{cells}")
    if options.output:
        options.output.write_text(json.dumps({"megabytes": options.megabytes, "clients": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
