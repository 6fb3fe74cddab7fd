"""Bytes to arrays and back: pictures, captions, latents stores, weights. Knows no model."""
