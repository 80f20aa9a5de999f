"""The browser page of a large catalogue: memory of the server, and how long it takes to answer.

    python -m benchmarks.curation.browsing [--rows 1000000] [--folder F]

Writes the synthetic catalogue of `benchmarks.catalogue` (once; it is kept), serves it as `svd browse` does in a process
of its own, and prints the server's memory and the median and longest time of each kind of answer: a threshold that is
dragged, pages in several orders, a search through all captions.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import httpx
import numpy as np
import psutil

from benchmarks.catalogue.__main__ import FILTERS, write_catalogue

ROUNDS = 15


def serve(folder: Path, port: int) -> None:
    """Serve the catalogue as `svd browse` does."""
    import uvicorn

    from svd.catalogue.browser.app import create_app

    uvicorn.run(create_app(folder), host="127.0.0.1", port=port, log_level="error")


def judge(folder: Path) -> None:
    """Write the verdicts that the page begins with."""
    from svd.catalogue import filters
    from svd.config import FiltersConfig

    filters.write_verdicts(folder, FiltersConfig.model_validate(FILTERS))


def timed(name: str, ask: Callable[[int], object], server: psutil.Process, rounds: int = ROUNDS) -> None:
    """Print how long `ask(number)` takes, and the server's memory afterwards."""
    seconds = []
    for number in range(rounds):
        began = time.perf_counter()
        ask(number)
        seconds.append(time.perf_counter() - began)
    memory = server.memory_info().rss / 1e6
    print(
        f"{name:34} {1e3 * median(seconds):7.0f} ms, longest {1e3 * max(seconds):7.0f} ms  {memory:6.0f} MB", flush=True
    )


def connect(address: str) -> httpx.Client:
    """A client, once the server answers."""
    client = httpx.Client(base_url=address, timeout=600)
    while True:
        try:
            client.get("/").raise_for_status()
            return client
        except httpx.ConnectError:
            time.sleep(0.05)


def measure(address: str, server: psutil.Process, rows: int) -> None:
    """Ask everything that the page asks."""
    began = time.perf_counter()
    client = connect(address)
    print(f"{rows} clips: serves after {time.perf_counter() - began:.1f} s, {server.memory_info().rss / 1e6:.0f} MB")
    thresholds = {"motion": 0.1, "aesthetics": 4.5, "similarity": 0.25, "text_area": 0.2}
    values = np.linspace(0.01, 2, ROUNDS)

    def page(**query: object) -> object:
        answer = client.post("/api/clips", json={"thresholds": thresholds, **query}).raise_for_status().json()
        assert len(answer["clips"]) == 48 or query.get("search")
        return answer

    def drag(number: int) -> object:
        moved = {**thresholds, "motion": values[number]}
        return client.post("/api/counts", json={"thresholds": moved}).raise_for_status().json()

    timed("drag of a threshold, four axes", drag, server)
    timed("page by source", lambda n: page(offset=48_000 * n % (rows - 48)), server)
    timed("page of dropped clips by source", lambda n: page(show="dropped", offset=4_800 * n), server)
    timed("first page by motion", lambda n: page(sort="motion_score", descending=True), server, 1)
    timed("other pages by motion", lambda n: page(sort="motion_score", descending=True, offset=48 + 48 * n), server)
    timed("search, each for other words", lambda n: page(search=f"red dog {('a', 'the', 'man')[n]}"), server, 3)
    timed("the same search again", lambda n: page(search="red dog man", offset=48 * n), server)


def main() -> None:
    """Write the catalogue, serve it, ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path("work/benchmarks/browsing"))
    options = parser.parse_args()
    write_catalogue(options.folder, options.rows)
    spawn = multiprocessing.get_context("spawn")
    judging = spawn.Process(target=judge, args=(options.folder,))
    judging.start()
    judging.join()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    process = spawn.Process(target=serve, args=(options.folder, port))
    process.start()
    try:
        assert process.pid is not None
        measure(f"http://127.0.0.1:{port}", psutil.Process(process.pid), options.rows)
    finally:
        process.terminate()
        process.join()


if __name__ == "__main__":
    main()
