"""Named API endpoints of the page."""
