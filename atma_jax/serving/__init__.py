"""The HTTP server: protocol, engine thread and application."""
