"""Bytes to arrays and back: images, captions, latents stores, weights. Knows no model."""
