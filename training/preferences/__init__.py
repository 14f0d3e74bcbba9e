"""Preferences: choices between candidates, the reward weights that explain them, and the export for TRL."""
