"""A Prefect plugin: `prefect deployment run full-pipeline` finds the one deployment of that name, without its flow's.

Prefect calls the hook at import when `[tool.prefect.plugins] enabled = true` stands in the working folder's
pyproject.toml. The wrapped method lies in a module that Prefect calls private: when a new version moves it, the plugin
does nothing and `full-pipeline/full-pipeline`, which needs no plugin, still works. The hook also binds a temporary
server to the life of its pipeline (temporary_server.py).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Awaitable, Callable
from typing import Any

from prefect.plugins import HookContext, SetupResult, register_hook

from flows.prefect_flows import temporary_server

_MODULE, _CLASS, _METHOD = (
    "prefect.client.orchestration._deployments.client",
    "DeploymentAsyncClient",
    "read_deployment_by_name",
)


def accept_bare_names(read_by_name: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Wrap the client's `read_deployment_by_name`: a name without a slash is looked up among all deployments."""

    @functools.wraps(read_by_name)
    async def read(client: Any, name: str) -> Any:
        if "/" in name:
            return await read_by_name(client, name)
        from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName

        wanted = DeploymentFilter(name=DeploymentFilterName(any_=[name]))
        found = await client.read_deployments(deployment_filter=wanted)
        if len(found) == 1:
            return found[0]
        if found:
            flows = [await client.request("GET", "/flows/{id}", path_params={"id": d.flow_id}) for d in found]
            names = ", ".join(f"{flow.json()['name']}/{name}" for flow in flows)
            raise ValueError(f"several deployments are called '{name}'; say which: {names}")
        return await read_by_name(client, name)

    return read


@register_hook
def setup_environment(*, ctx: HookContext) -> SetupResult | None:
    """Prefect's plugin hook; installs the wrapper once."""
    if temporary_server.is_temporary():
        temporary_server.end_with_parent()
    client = getattr(importlib.import_module(_MODULE), _CLASS, None)
    method = getattr(client, _METHOD, None)
    if method is not None and not hasattr(method, "__wrapped__"):
        setattr(client, _METHOD, accept_bare_names(method))
    return None
