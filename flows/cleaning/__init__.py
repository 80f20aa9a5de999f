"""What can go and what can't: garbage collection of caches, the store, MLflow's artifacts and old results."""
