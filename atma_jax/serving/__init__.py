"""The HTTP server: the OpenAI completions protocol, an engine in a thread of its own, limits, and metrics."""
