"""DPO: train a model on choices between its recipes, with TRL."""
