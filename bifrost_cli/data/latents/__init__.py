"""The latents store: a Zarr v3 group with an index."""
