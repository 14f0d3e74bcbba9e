"""GRPO fine-tuning with TRL: `python -m training.grpo <run folder>`."""
