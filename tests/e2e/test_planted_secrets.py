"""Secrets are planted wherever a user has some; then every byte that a pipeline and its servers wrote is searched."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from micro_project import Project, make_project
from servers import Server, free_ports, mlflow_server
from test_bad_input import write_video
from web_server import serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
WORD = "pl4nted"
PLANTED = {
    "AWS_ACCESS_KEY_ID": f"{WORD}-aws-id",
    "AWS_SECRET_ACCESS_KEY": f"{WORD}-aws-key",
    "AWS_SESSION_TOKEN": f"{WORD}-aws-session",
    "HF_TOKEN": f"{WORD}-hf",
    "PREFECT_API_AUTH_STRING": f"user:{WORD}-prefect",
}
MINE = ("list.csv", ".dvc/config.local")  # where the user has put them
PIPELINE = "from flows.prefect_flows.full_pipeline import full_pipeline as run; run('micro', {stages})"
SWITCHED_OFF = "import svd.core.addresses as rule\nrule.public_address = str\n"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = make_project(
        tmp_path / "project", sources__synthetic=None, sources__paths=["list.csv"], encoders__toy_iterations=2
    )
    remote = "url = s3://nowhere/dvc\n    secret_access_key = "
    (project.root / ".dvc" / "config.local").write_text(f"['remote \"away\"']\n    {remote}{WORD}-dvc\n")
    return project


@pytest.fixture
def web(tmp_path: Path, project: Project) -> Iterator[str]:
    """A web server that demands a password, and the user's list of two videos there, one of which is missing."""
    served = tmp_path / "served"
    served.mkdir()
    write_video(served / "video.mp4", frames=60, seed=1)
    with serving(served, login=f"user:{WORD}-web") as (address, _):
        host = address.removeprefix("http://")
        query = f"v=1&X-Amz-Credential={WORD}-credential&X-Amz-Signature={WORD}-signature"
        places = [f"http://user:{WORD}-web@{host}/{name}.mp4?{query}" for name in ("video", "missing")]
        rows = [f"{place},a wave,http://h/poster.jpg?w=9&token={WORD}-poster" for place in places]
        (project.root / "list.csv").write_text("\n".join(["url,caption,poster", *rows, ""]))
        yield address


@pytest.fixture
def mlflow(project: Project) -> Iterator[Server]:
    port = free_ports(1)[0]
    folder = project.root / ".local" / "server"
    server = mlflow_server(folder, port, str(folder / "artifacts"), {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
    server.start()
    yield server
    server.stop()


def secrets(server: Server) -> dict[str, str]:
    """The variables of the user's shell."""
    host = server.url.removeprefix("http://").removesuffix("/health")
    return PLANTED | {"MLFLOW_TRACKING_URI": f"http://user:{WORD}-mlflow@{host}"}


def found_in(project: Project) -> list[str]:
    """The files with a planted word, of the project, of Prefect's home, and what was printed."""
    own = {project.root / name for name in MINE}
    home = Path(project.environment()["PREFECT_HOME"])
    files = [path for folder in (project.root, home) for path in folder.rglob("*") if path.is_file()]
    files += [project.root.with_name(f"{project.root.name}.log")]
    return [str(path.relative_to(project.root.parent)) for path in files if path not in own and holds(path)]


def holds(path: Path) -> bool:
    """Whether a file holds the word, a Parquet file also in its compressed pages."""
    if WORD.encode() in path.read_bytes():
        return True
    return path.suffix == ".parquet" and WORD in json.dumps(pl.read_parquet(path).to_dicts(), default=str)


def test_no_planted_secret_is_in_anything_that_was_written(project: Project, web: str, mlflow: Server) -> None:
    run = PIPELINE.format(stages=["sources", "encoders", "curation"])
    said = project.run(sys.executable, "-c", run, **secrets(mlflow))
    assert found_in(project) == []
    said += project.run("svd", "doctor", "-p", "micro", **secrets(mlflow))
    said += project.run("svd", "curate", "list.csv", "--dry-run", "-p", "micro", **secrets(mlflow))
    assert WORD not in said
    sources = pl.read_parquet(project.outputs / "curation" / "catalogue" / "sources.parquet")
    assert dict(sources.select("source_uri", "verdict").iter_rows()) == {
        f"{web}/missing.mp4?v=1": "failed",
        f"{web}/video.mp4?v=1": "ok",
    }
    assert list(project.root.rglob("prefect.db*")) or list(Path(project.environment()["PREFECT_HOME"]).rglob("*.db"))
    assert (project.root / ".local" / "server" / "mlflow.db").stat().st_size > 0
    assert_a_failed_run_tells_nothing_either(project, web, mlflow)


def assert_a_failed_run_tells_nothing_either(project: Project, web: str, mlflow: Server) -> None:
    """Run again with no video to be had and MLflow away: what is logged waits on the disk, Prefect keeps the error."""
    mlflow.stop()
    users = project.root / "list.csv"
    users.write_text("\n".join(line for line in users.read_text().splitlines() if "video.mp4" not in line))
    said = project.run(sys.executable, "-c", PIPELINE.format(stages=["sources", "curation"]), code=1, **secrets(mlflow))
    assert f"not one of 1 sources gave a clip ({web}/missing.mp4?v=1: " in " ".join(said.split())
    assert "can't be reached" in said and list((project.root / "work" / "tracking").glob("*/journal.jsonl"))
    assert found_in(project) == []


def test_the_search_finds_them_when_the_rule_is_switched_off(project: Project, web: str, mlflow: Server) -> None:
    with (project.root / ".faults" / "sitecustomize.py").open("a") as stream:
        stream.write(SWITCHED_OFF)
    project.run("svd", "stage", "sources", "-p", "micro", **secrets(mlflow))
    assert "project/outputs/micro/sources/footage/sources.jsonl" in found_in(project)


def test_no_database_password_is_an_argument_of_a_process() -> None:
    """Arguments show in the list of processes to everybody on the machine."""
    root = Path(__file__).resolve().parents[2]
    names = ["compose.yaml", "infra", "flows", "Makefile", ".ci"]
    command = ["git", "grep", "-nE", r"--(backend-store-uri|database-url|password)[ =\"',]+.*(postgresql|PASSWORD)"]
    hits = subprocess.run([*command, "--", *names], cwd=root, capture_output=True, text=True, check=False).stdout
    assert hits == ""
