"""Fine-tuning on Moondream's hosted tuning API."""
