"""The database: connection, schema, migrations and saved reward functions."""
