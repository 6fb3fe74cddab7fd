"""extract-latents: captioned images into a latents store."""
