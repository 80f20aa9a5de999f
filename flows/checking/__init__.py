"""Whether a platform can run the stages: probes that run in a pool, and the caller that reads them from outside."""
