"""Write `dvc.yaml`, `branches/dvc.yaml` and `prefect.yaml` from the table of stages."""
