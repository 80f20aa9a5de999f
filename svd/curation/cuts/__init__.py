"""Cut detection: the cascade of detectors over one decode."""
