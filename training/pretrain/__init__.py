"""Pre-training of moondream-tiny: `python -m training.pretrain`."""
