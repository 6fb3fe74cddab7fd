"""Model references to loaded, frozen models: the hub, offloading, quantization, hashes."""
