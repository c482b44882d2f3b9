"""HTTP: the application, what wraps requests, and the service that stands behind routes."""
