"""What is served beside the page: plain HTTP routes."""
