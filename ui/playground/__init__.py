"""The Playground tab: compare the answers of several models on one photo."""
