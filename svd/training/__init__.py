"""Training: stages, the Lightning module, callbacks and parallelism (§4, App. D)."""
