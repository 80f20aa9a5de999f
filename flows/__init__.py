"""The Prefect flows, the command line, and what they know of DVC, MLflow and Prefect.

Whoever imports this sends no usage statistics to the makers of these tools, unless the environment says otherwise.
"""

import os

NO_TELEMETRY = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
for _name, _value in NO_TELEMETRY.items():
    os.environ.setdefault(_name, _value)
