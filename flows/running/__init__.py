"""Run one stage: its folders, its MLflow run, what is left of a killed one."""
