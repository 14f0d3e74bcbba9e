"""Training: GRPO fine-tuning, pre-training of moondream-tiny, runs, evaluation and the tuning server."""
