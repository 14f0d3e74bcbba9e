"""What is kept: saved reward functions, in SQLite or PostgreSQL."""
