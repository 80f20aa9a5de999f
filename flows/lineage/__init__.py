"""Where a model comes from, and where a source went: answered by MLflow's records and DVC's hashes."""
