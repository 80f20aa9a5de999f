"""What a user's mistake looks like inside Prefect, and what a silent run must be."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from flows import dispatch, stack
from flows.mistakes import hide_tracebacks
from svd.stage import UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("error", "shown"), [(UserError("no videos"), False), (RuntimeError("a bug"), True)])
@pytest.mark.parametrize("logger", ["prefect.flow_runs", "prefect.task_runs"])
def test_only_mistakes_lose_their_traceback(
    logger: str, error: Exception, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_tracebacks()
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", records.append)
    logging.getLogger(logger).addHandler(handler)
    try:
        raise error
    except Exception as caught:
        logging.getLogger(logger).exception("Encountered exception during execution: %r", caught)
    finally:
        logging.getLogger(logger).removeHandler(handler)
    assert bool(records[-1].exc_info) is shown
    assert str(error) in records[-1].getMessage()


FLOW = """
from prefect import flow, task
from flows.mistakes import hide_tracebacks
from svd.stage import UserError
hide_tracebacks()
@task
def read():
    raise UserError("no videos")
@flow
def stage():
    read()
@flow
def pipeline():
    stage()
try:
    pipeline()
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_mistake_inside_flows_is_told_without_a_traceback(tmp_path: Path) -> None:
    environment = os.environ | {"PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    environment.pop("PREFECT_API_URL", None)
    result = subprocess.run([sys.executable, "-c", FLOW], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.strip().endswith("no videos"), result.stderr
    assert "UserError('no videos')" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("Flow run encountered an exception: UserError: outputs/tiny/latents is not there", UserError),
        ("Flow run encountered an exception: ConfigError: unknown key 'seeed'", UserError),
        ("Flow run encountered an exception: RuntimeError: CUDA out of memory", RuntimeError),
        (None, RuntimeError),
    ],
)
def test_a_childs_mistake_stays_a_mistake(
    message: str | None, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = SimpleNamespace(name="Failed", message=message, is_completed=lambda: False)
    child = SimpleNamespace(id="some-id", state=state)
    monkeypatch.setattr(dispatch, "_idempotency_key", lambda stem: stem)
    monkeypatch.setattr(dispatch, "run_deployment", lambda *_, **__: child)
    monkeypatch.setattr(dispatch, "_wait", lambda _: child)
    monkeypatch.setenv("SVD_DISPATCH", "deployment")
    with pytest.raises(kind, match="stage 'latents' ended Failed in flow run some-id") as caught:
        dispatch.dispatch("latents", "tiny", "key", [])
    assert type(caught.value) is kind


def test_a_run_beats_often_enough_for_the_automation_that_calls_it_crashed() -> None:
    code = "from prefect.settings import get_current_settings as s; print(s().flows.heartbeat_frequency)"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    beat = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    automations = yaml.safe_load((ROOT / "infra/prefect/automations.yaml").read_text())["automations"]
    silent = next(a for a in automations if a["name"] == "crash-silent-runs")
    assert silent["trigger"]["within"] >= 4 * int(beat.stdout)


def test_flows_are_deployed_until_it_worked_and_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".local" / "prefect").mkdir(parents=True)
    (tmp_path / "prefect.yaml").write_text("name: a")
    deployed: list[str] = []

    def deploy(env: dict[str, str]) -> None:
        if not deployed:
            deployed.append("killed")
            raise KeyboardInterrupt
        deployed.append(env["PREFECT_API_URL"])

    monkeypatch.setattr(stack, "_deploy", deploy)
    everything = {"s3", "prefect", "mlflow", "worker-cpu", "worker-gpu"}
    arguments = (stack.Ports(), {"PREFECT_API_URL": "api"})
    with pytest.raises(KeyboardInterrupt):
        stack._start_missing(*arguments, everything, print)
    for _ in range(2):
        stack._start_missing(*arguments, everything, print)
    assert deployed == ["killed", "api"]
    (tmp_path / "prefect.yaml").write_text("name: b")
    stack._start_missing(*arguments, everything, print)
    assert deployed == ["killed", "api", "api"]
