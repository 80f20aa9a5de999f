"""Diffusion as mathematics, independent of any network: preconditioning, noise distributions, solvers, guidance."""
