"""Clips: which frames they hold, what is sampled from them, how they are written."""
