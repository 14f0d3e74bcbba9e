"""Access control: roles, visitors, sessions and the permissions of handlers and routes."""
