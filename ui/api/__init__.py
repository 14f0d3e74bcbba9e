"""Named API endpoints of the page, for gradio_client and HTTP clients."""
