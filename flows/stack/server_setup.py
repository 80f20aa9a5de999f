"""A Prefect server's needs besides deployments: automations, queues, a block for results of runs, a cluster's pools.

`svd stack up` installs the first two; `python -m flows.stack.server_setup` (compose) the block of results too, and with
`--kubernetes` (a cluster) the pools `cpu` and `gpu` of infra/prefect/kubernetes-pools.yaml.
"""

from __future__ import annotations

import argparse
import base64
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
# Which images flow runs use; infra/kubernetes/image/image.env sets them for a cluster.
IMAGE_DEFAULTS = {"SVD_IMAGES": "svd-platform", "SVD_IMAGE_TAG": "dev", "SVD_IMAGE_PULL_POLICY": "IfNotPresent"}


def _send(url: str, value: dict[str, Any], method: str = "POST") -> Any:
    body = json.dumps(value).encode()
    headers = {"Content-Type": "application/json"}
    if password := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = f"Basic {base64.b64encode(password.encode()).decode()}"
    request = urllib.request.Request(url, body, headers, method=method)
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


def make_bucket(bucket: str) -> None:
    """Create the bucket unless it exists; the store's address and credentials are those of the environment.

    Raises botocore.exceptions.ClientError when the store forbids it.
    """
    import boto3
    from botocore.exceptions import ClientError

    s3 = boto3.client("s3")
    try:
        s3.head_bucket(Bucket=bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] != "404":
            raise
        s3.create_bucket(Bucket=bucket)


def save_results_block(bucket: str) -> None:
    """Save the block `remote-file-system/results`: results of children must reach parents on other nodes.

    Used when PREFECT_DEFAULT_RESULT_STORAGE_BLOCK=remote-file-system/results. The block holds no credentials, because
    Prefect's API hands it to everyone: flow runs take them from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and
    AWS_ENDPOINT_URL.
    """
    from prefect.filesystems import RemoteFileSystem

    RemoteFileSystem(basepath=f"s3://{bucket}/prefect-results").save(RESULTS_BLOCK, overwrite=True)


def kubernetes_pools() -> dict[str, dict[str, Any]]:
    """Return each pool of infra/prefect/kubernetes-pools.yaml: `concurrency_limit` and the `base_job_template`.

    Images are named by SVD_IMAGES, SVD_IMAGE_TAG and SVD_IMAGE_PULL_POLICY. The file that SVD_POOLS names, if any,
    overrides limits and defaults of the pools it lists (infra/kubernetes/single-gpu/pools.yaml).
    """
    described = yaml.safe_load(POOLS.read_text())
    own = yaml.safe_load(Path(os.environ["SVD_POOLS"]).read_text())["pools"] if os.environ.get("SVD_POOLS") else {}
    prefix, tag, policy = (os.environ.get(name) or default for name, default in IMAGE_DEFAULTS.items())
    pools = {}
    for name, pool in described["pools"].items():
        template, changed = copy.deepcopy(described["template"]), own.get(name, {})
        images = {"image": f"{prefix}/{pool['image']}:{tag}", "image_pull_policy": policy}
        for variable, value in (pool["defaults"] | images | changed.get("defaults", {})).items():
            template["variables"]["properties"][variable]["default"] = value
        limit = changed.get("concurrency_limit", pool["concurrency_limit"])
        pools[name] = {"concurrency_limit": limit, "base_job_template": template}
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
    bucket = split_uri(os.environ["SVD_STORE"])[0]
    make_bucket(bucket)
    save_results_block(bucket)


if __name__ == "__main__":
    set_up_server()
