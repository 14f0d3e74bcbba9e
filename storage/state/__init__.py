"""Persistent state of a deployment without a lasting disk, kept in a Hugging Face Storage Bucket."""
