"""A Prefect server's needs besides deployments: automations, queues, a block for results of runs, a cluster's pools.

`svd stack up` installs the first two; `python -m flows.stack.server_setup` (compose) the block of results too, and with
`--kubernetes` (a cluster) the pools `cpu` and `gpu` of infra/prefect/kubernetes-pools.yaml.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from svd.storage import split_uri

# Templates of the stack itself: they belong to this code, not to the project in the working folder.
INFRA = Path(__file__).resolve().parents[2] / "infra" / "prefect"
AUTOMATIONS = INFRA / "automations.yaml"
POOLS = INFRA / "kubernetes-pools.yaml"
PIPELINES = {"name": "pipelines", "concurrency_limit": 1}
RESULTS_BLOCK = "results"


def _send(url: str, value: dict[str, Any], method: str = "POST") -> Any:
    body = json.dumps(value).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read() or "null")


def install_automations(api: str) -> list[str]:
    """Create the automations of infra/prefect/automations.yaml that the server at `api` lacks; return their names."""
    made = []
    for automation in yaml.safe_load(AUTOMATIONS.read_text())["automations"]:
        wanted = {"automations": {"name": {"any_": [automation["name"]]}}}
        if not _send(f"{api}/automations/filter", wanted):
            _send(f"{api}/automations/", automation)
            made.append(automation["name"])
    return made


def limit_pipelines(api: str) -> None:
    """Make the queue `pipelines` of the pool `cpu`, which must exist, run one pipeline at a time."""
    queues = f"{api}/work_pools/cpu/queues"
    try:
        _send(queues, PIPELINES)
    except urllib.error.HTTPError as error:
        if error.code != 409:  # 409: the queue is there
            raise
        _send(f"{queues}/{PIPELINES['name']}", PIPELINES, "PATCH")


def save_results_block(bucket: str) -> None:
    """Save the block `remote-file-system/results`: results of children must reach parents on other nodes.

    Used when PREFECT_DEFAULT_RESULT_STORAGE_BLOCK=remote-file-system/results.
    """
    from prefect.filesystems import RemoteFileSystem

    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    settings: dict[str, Any] = {"client_kwargs": {"endpoint_url": endpoint}} if endpoint else {}
    settings |= {"key": os.environ["AWS_ACCESS_KEY_ID"], "secret": os.environ["AWS_SECRET_ACCESS_KEY"]}
    RemoteFileSystem(basepath=f"s3://{bucket}/prefect-results", settings=settings).save(RESULTS_BLOCK, overwrite=True)


def kubernetes_pools() -> dict[str, dict[str, Any]]:
    """Return the pools of infra/prefect/kubernetes-pools.yaml: `concurrency_limit` and whole `base_job_template`."""
    described = yaml.safe_load(POOLS.read_text())
    pools = {}
    for name, pool in described["pools"].items():
        template = copy.deepcopy(described["template"])
        for variable, value in pool["defaults"].items():
            template["variables"]["properties"][variable]["default"] = value
        pools[name] = {"concurrency_limit": pool["concurrency_limit"], "base_job_template": template}
    return pools


def install_kubernetes_pools() -> None:
    """Create the pools at PREFECT_API_URL, or bring existing ones up to date; runs in flight are not touched."""
    from prefect import get_client
    from prefect.client.schemas.actions import WorkPoolCreate

    with get_client(sync_client=True) as client:
        for name, pool in kubernetes_pools().items():
            client.create_work_pool(WorkPoolCreate(name=name, type="kubernetes", **pool), overwrite=True)


def set_up_server() -> None:
    """Set up the server at PREFECT_API_URL; the bucket is that of SVD_STORE."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kubernetes", action="store_true", help="also the pools cpu and gpu of a cluster")
    options = parser.parse_args()
    missing = [n for n in ("PREFECT_API_URL", "SVD_STORE", "AWS_ACCESS_KEY_ID") if not os.environ.get(n)]
    if missing:
        sys.exit(f"set {', '.join(missing)} first")
    if options.kubernetes:
        install_kubernetes_pools()
    install_automations(os.environ["PREFECT_API_URL"])
    limit_pipelines(os.environ["PREFECT_API_URL"])
    save_results_block(split_uri(os.environ["SVD_STORE"])[0])


if __name__ == "__main__":
    set_up_server()
