"""What training steps read: latents and conditioning, encoded batch by batch, from a cache, or from prompts alone."""
