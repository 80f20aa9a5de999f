"""Measuring sources: one decode pass per source, in a guarded process."""
