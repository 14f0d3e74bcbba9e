"""Makes models: the embedded one from scratch, and better ones by reinforcement."""
