"""Throughput of svd/storage beside boto3's own transfer manager and SeaweedFS's own client, on one local server.

    python -m benchmarks.storage --megabytes 256 --repeats 3

Prints a table and writes benchmarks' usual JSON with --output. The clients take turns, in random order each round,
and nothing is left to be written when one begins. Rates are of median times; a ratio is our rate by the
client's (above 1: svd.storage is faster).

svd/storage computes and verifies a SHA-256 in both directions and syncs what it downloaded. boto3 does neither;
`boto3, same guarantee` adds both around it. `weed` is SeaweedFS's own client, which knows the servers behind the S3
port and starts a process each time; `plain HTTP` is one stream to and from SeaweedFS's filer, without S3, checksum or
sync: what this machine's server can do. Below the table: what SHA-256 and a synced write of the file cost alone.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import boto3

from svd import storage

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from servers import BIN, S3Server

Action = Callable[[], object]
Seconds = dict[str, dict[str, list[float]]]
OURS = "svd.storage"
BLOCK = 1 << 20


def synced(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def boto_actions(server: S3Server, path: Path, back: Path) -> dict[str, tuple[Action, Action]]:
    """boto3's transfer manager with its defaults, alone and with what svd.storage guarantees."""
    session = boto3.Session(server.key, server.secret, region_name="us-east-1")
    client = session.client("s3", endpoint_url=server.url)

    def checked_upload() -> None:
        digest = storage.sha256(path)
        client.upload_file(str(path), "bench", "checked", ExtraArgs={"Metadata": {"sha256": digest}})

    def checked_download() -> None:
        client.download_file("bench", "checked", str(back))
        assert storage.sha256(back) == client.head_object(Bucket="bench", Key="checked")["Metadata"]["sha256"]
        synced(back)

    return {
        "boto3": (
            lambda: client.upload_file(str(path), "bench", "boto3"),
            lambda: client.download_file("bench", "boto3", str(back)),
        ),
        "boto3, same guarantee": (checked_upload, checked_download),
    }


def weed_actions(server: S3Server, path: Path, back: Path) -> dict[str, tuple[Action, Action]]:
    """SeaweedFS's own client, and plain requests to its filer."""
    folder = f"http://127.0.0.1:{server.filer}/buckets/bench/weed/"

    def weed(*arguments: str) -> None:
        subprocess.run([str(BIN / "weed"), *arguments], check=True, capture_output=True)

    def request(method: str, body: object = None, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", server.filer, blocksize=BLOCK)
        connection.request(method, "/buckets/bench/plain", body=body, headers=headers or {})  # type: ignore[arg-type]
        response = connection.getresponse()
        assert response.status < 300, response.status
        return response

    def put() -> None:
        with path.open("rb") as stream:
            request("PUT", stream, {"Content-Length": str(path.stat().st_size)}).read()

    def get() -> None:
        buffer = memoryview(bytearray(BLOCK))
        with request("GET") as response, back.open("wb", buffering=0) as stream:
            while count := response.readinto(buffer):
                stream.write(buffer[:count])

    return {
        "weed": (
            lambda: weed("filer.copy", str(path), folder),
            lambda: weed("filer.cat", "-o", str(back), f"{folder}{path.name}"),
        ),
        "plain HTTP": (put, get),
    }


def seconds_of(action: Action) -> float:
    """How long `action` takes when the system has nothing else to write."""
    os.sync()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(server: S3Server, path: Path, back: Path, repeats: int) -> Seconds:
    """Seconds of each round by client and direction; the first round warms up and is dropped."""
    clients: dict[str, tuple[Action, Action]] = {
        OURS: (lambda: storage.upload(path, "s3://bench/svd"), lambda: storage.download("s3://bench/svd", back)),
        **boto_actions(server, path, back),
        **weed_actions(server, path, back),
    }
    found: Seconds = {name: {"upload": [], "download": []} for name in clients}
    order = random.Random(0)
    for _ in range(repeats + 1):
        for name in order.sample(list(clients), len(clients)):
            back.unlink(missing_ok=True)
            for direction, action in zip(("upload", "download"), clients[name], strict=True):
                found[name][direction].append(seconds_of(action))
            assert storage.sha256(back) == storage.sha256(path), name
    return {name: {d: seconds[1:] for d, seconds in both.items()} for name, both in found.items()}


def limits(path: Path, back: Path, megabytes: int) -> dict[str, float]:
    """MB/s of hashing the file, and of writing it to this disk with a sync."""
    data = path.read_bytes()

    def write() -> None:
        back.write_bytes(data)
        synced(back)

    return {
        name: megabytes / seconds_of(do) for name, do in (("sha256", lambda: storage.sha256(path)), ("disk", write))
    }


def summary(seconds: Seconds, megabytes: int) -> dict[str, dict[str, dict[str, float]]]:
    """MB/s, and our speed as a multiple of each client's, by client and direction."""
    ours = {direction: statistics.median(times) for direction, times in seconds[OURS].items()}
    return {
        client: {
            direction: {
                "MB/s": megabytes / statistics.median(times),
                "svd.storage is": statistics.median(times) / ours[direction],
            }
            for direction, times in both.items()
        }
        for client, both in seconds.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        server, path, back = S3Server(Path(name) / "server"), Path(name) / "file", Path(name) / "back"
        os.environ.update(server.environment())
        path.write_bytes(os.urandom(BLOCK) * options.megabytes)
        server.start()
        try:
            server.make_bucket("bench")
            rows = summary(measure(server, path, back, options.repeats), options.megabytes)
        finally:
            server.stop()
        alone = limits(path, back, options.megabytes)
    for client, both in rows.items():
        cells = (f"{d} {v['MB/s']:5.0f} MB/s (svd.storage {v['svd.storage is']:.2f} x)" for d, v in both.items())
        print(f"{client:24}{'   '.join(cells)}")
    print("alone: " + ", ".join(f"{what} {rate:.0f} MB/s" for what, rate in alone.items()))
    if options.output:
        found = {"megabytes": options.megabytes, "clients": rows, "alone": alone}
        options.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
