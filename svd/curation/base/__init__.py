"""Shared by all steps of curation: records of sources and clips, messages between processes."""
