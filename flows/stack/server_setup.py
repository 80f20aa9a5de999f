"""A Prefect server's needs besides deployments: automations, queues, a block for results of runs, a cluster's pools.

`svd stack up` installs the first two; `svd platform init` (compose, a cluster) the rest as well. Everything here may be
done again at any time, and is: by every start of a worker's pod.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flows.stages import POOLS
from svd.core.errors import UserError
from svd.storage import split_uri

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

# Templates of the stack itself: they belong to this code, not to the project in the working folder.
INFRA = Path(__file__).resolve().parents[2] / "infra" / "prefect"
AUTOMATIONS = INFRA / "automations.yaml"
POD_AUTOMATIONS = INFRA / "pod-automations.yaml"
NOTIFICATIONS = INFRA / "notifications.yaml"
KUBERNETES_POOLS = INFRA / "kubernetes-pools.yaml"
PIPELINES = {"name": "pipelines", "concurrency_limit": 1}
RESULTS_BLOCK = "results"
NOTIFICATION_BLOCK = "svd-notifications"
WRITTEN_POOLS = "svd_pools"  # the Prefect variable with the digests of the pools as they were last written here
# Which images flow runs use; infra/kubernetes/image/image.env sets them for a cluster.
IMAGE_DEFAULTS = {"SVD_IMAGES": "svd-platform", "SVD_IMAGE_TAG": "dev", "SVD_IMAGE_PULL_POLICY": "IfNotPresent"}


def send(url: str, value: dict[str, Any], method: str = "POST") -> Any:
    """Send JSON to Prefect's server and return what it answers; raises urllib.error.HTTPError."""
    body = json.dumps(value).encode()
    headers = {"Content-Type": "application/json"}
    if password := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = f"Basic {base64.b64encode(password.encode()).decode()}"
    request = urllib.request.Request(url, body, headers, method=method)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read() or "null")


def install_automations(api: str, *files: Path, notify: str | None = None) -> list[str]:
    """Create the automations of automations.yaml and `files` that the server at `api` lacks; return their names.

    notify: id of the block that sends messages; with one, those of notifications.yaml as well.
    """
    automations = [a for file in (AUTOMATIONS, *files) for a in yaml.safe_load(file.read_text())["automations"]]
    if notify:
        automations += _notifications(notify)
    made = []
    for automation in automations:
        wanted = {"automations": {"name": {"any_": [automation["name"]]}}}
        if not send(f"{api}/automations/filter", wanted):
            send(f"{api}/automations/", automation)
            made.append(automation["name"])
    return made


def _notifications(block: str) -> list[dict[str, Any]]:
    """Return the automations of infra/prefect/notifications.yaml, with the block that sends their messages."""
    automations: list[dict[str, Any]] = yaml.safe_load(NOTIFICATIONS.read_text())["automations"]
    for automation in automations:
        for action in automation["actions"]:
            action["block_document_id"] = block
    return automations


def save_notification_block(url: str) -> str:
    """Save the block that posts messages to the webhook `url`, as a secret of the block; return its id."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock

    block = CustomWebhookNotificationBlock(
        name="svd",
        url="{{url}}",
        json_data={"text": "{{subject}}\n{{body}}"},
        secrets={"url": url},
    )
    return str(block.save(NOTIFICATION_BLOCK, overwrite=True))


def limit_pipelines(api: str) -> None:
    """Make the queue `pipelines` of the pool `cpu`, which must exist, run one pipeline at a time."""
    queues = f"{api}/work_pools/cpu/queues"
    try:
        send(queues, PIPELINES)
    except urllib.error.HTTPError as error:
        if error.code != 409:  # 409: the queue is there
            raise
        send(f"{queues}/{PIPELINES['name']}", PIPELINES, "PATCH")


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
    described = yaml.safe_load(KUBERNETES_POOLS.read_text())
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


def install_kubernetes_pools(overwrite: bool = False) -> list[str]:
    """Create the pools at PREFECT_API_URL, or bring those up to date that are as the last call left them.

    Returns the names of the pools that were left alone, because somebody edited them in Prefect or made them himself;
    `overwrite` replaces these, too. Runs in flight are not touched.
    """
    from prefect import get_client
    from prefect.client.schemas.actions import WorkPoolCreate

    kept, noted = [], _noted_pools()
    with get_client(sync_client=True) as client:
        for name, pool in kubernetes_pools().items():
            present = _pool_digest(client, name)
            if present and present != noted.get(name) and not overwrite:
                kept.append(name)
                continue
            client.create_work_pool(WorkPoolCreate(name=name, type="kubernetes", **pool), overwrite=True)
            noted[name] = str(_pool_digest(client, name))
    _note_pools(noted)
    return kept


def install_process_pools() -> None:
    """Create the pools of local processes at PREFECT_API_URL that are missing; workers write their templates."""
    from prefect import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists

    with get_client(sync_client=True) as client:
        for name in POOLS:
            with contextlib.suppress(ObjectAlreadyExists):
                client.create_work_pool(WorkPoolCreate(name=name, type="process"))


def _pool_digest(client: SyncPrefectClient, name: str) -> str | None:
    """Return the SHA-256 of what `install_kubernetes_pools` writes of a pool, as the server has it; None: no pool."""
    from prefect.exceptions import ObjectNotFound

    try:
        pool = client.read_work_pool(name)
    except ObjectNotFound:
        return None
    content = json.dumps([pool.concurrency_limit, pool.base_job_template], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _noted_pools() -> dict[str, str]:
    """Return the digest of each pool as it was last written here, from a Prefect variable."""
    from prefect.variables import Variable

    return dict(Variable.get(WRITTEN_POOLS, default={}))


def _note_pools(digests: dict[str, str]) -> None:
    from prefect.variables import Variable

    Variable.set(WRITTEN_POOLS, digests, overwrite=True)


def set_up_server(kind: str, overwrite: bool = False) -> list[str]:
    """Set up the server at PREFECT_API_URL, except for its deployments; the bucket is that of SVD_STORE.

    Messages go to the webhook SVD_NOTIFY_URL, where it is set.
    kind: what runs the pools' flow runs, "kubernetes" or "process". Returns the pools that were kept as they are: see
    `install_kubernetes_pools`. Raises UserError for a missing variable.
    """
    missing = [n for n in ("PREFECT_API_URL", "SVD_STORE", "AWS_ACCESS_KEY_ID") if not os.environ.get(n)]
    if missing:
        raise UserError(f"set {', '.join(missing)} first")
    kept = []
    if kind == "kubernetes":
        kept = install_kubernetes_pools(overwrite)
    else:
        install_process_pools()
    api, bucket = os.environ["PREFECT_API_URL"], split_uri(os.environ["SVD_STORE"])[0]
    webhook = os.environ.get("SVD_NOTIFY_URL")
    extra = [POD_AUTOMATIONS] if kind == "kubernetes" else []
    install_automations(api, *extra, notify=save_notification_block(webhook) if webhook else None)
    limit_pipelines(api)
    make_bucket(bucket)
    save_results_block(bucket)
    return kept
