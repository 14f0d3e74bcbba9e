"""Fine-tuning runs: their folders, queue, backends, exports and tuned models."""
