"""What wraps HTTP requests."""
