"""Captioners: one module per captioner, named like the captioner."""
