"""The server of the Model Context Protocol: the Playground as tools for agents."""
