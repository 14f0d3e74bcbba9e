"""The database (connection, schema, migrations, saved reward functions) and atomic file writes."""
