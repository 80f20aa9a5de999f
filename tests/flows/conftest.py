"""Fixtures that several files of tests on the commands share."""

from generate_fixtures import picture, run, trained

__all__ = ["picture", "run", "trained"]
