"""A pixel-space text-to-image transformer, its objective, text towers and sampler."""
