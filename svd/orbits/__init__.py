"""Orbits rendered around meshes for the multi-view model (§4.5, D.6)."""
