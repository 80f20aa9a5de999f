"""Flows as deployments: a child's mistake stays one, runs beat often enough, changed flows are deployed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest
import yaml
from prefect.client.schemas.objects import FlowRun
from prefect.states import Failed

from flows.prefect_flows import dispatch
from flows.stack import stack
from svd.core.errors import UserError

ROOT = Path(__file__).parents[2]


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
    child = FlowRun(id=uuid4(), flow_id=uuid4(), state=Failed(message=message))
    monkeypatch.setattr(dispatch, "_start_child", lambda *_: child)
    monkeypatch.setenv("SVD_DISPATCH", "deployment")
    with pytest.raises(kind, match="stage 'latents' ended Failed in flow run") as caught:
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
