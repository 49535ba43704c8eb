"""Jobs, the worker process, and the HTTP server."""
