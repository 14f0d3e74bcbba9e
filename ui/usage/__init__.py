"""The Usage tab."""
