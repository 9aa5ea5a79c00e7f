"""Batch files: many requests in a file, one a line; one runner behind the command and the server's routes."""
