"""The Evaluate tab: rank models on a set of photos."""
