"""The trainer behind the `/v1/tuning` endpoints."""
