"""Hosted inference: Moondream Cloud and other servers of its API, over HTTP."""
