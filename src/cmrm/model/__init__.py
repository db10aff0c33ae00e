"""Models: loading and wrapping, decoder layers, prompts as tensors, and what identifies a model."""
