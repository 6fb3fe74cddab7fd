"""Frozen diffusion models (FLUX, Stable Diffusion 3) and the latent ControlNet."""
