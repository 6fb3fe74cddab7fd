"""generate, reconstruct and ask: the pipeline of prior and decoder, and the folders of images it fills."""
