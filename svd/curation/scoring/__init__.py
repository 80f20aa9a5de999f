"""Scoring measured clips with networks."""
