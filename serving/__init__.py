"""HTTP routes beside the page: the /v1 API, the tuning API, usage, health and metrics."""
