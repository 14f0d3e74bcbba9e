"""Evaluations of several models on a set of photos: folders like runs, with a leaderboard and a report."""
