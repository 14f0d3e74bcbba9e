"""Training: the embedded model's own pre-training, and what its supervision is computed from."""
