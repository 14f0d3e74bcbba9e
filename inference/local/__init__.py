"""Local inference: one device, its queue, batched generation and the cache of loaded models."""
