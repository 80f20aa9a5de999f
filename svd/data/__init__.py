"""Data: synthetic worlds, sources, shards, latents, loader, rendering."""
