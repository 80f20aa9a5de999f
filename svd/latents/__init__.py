"""Encoded clips: the latent cache, the stage that fills it and the loader that training reads it with."""
