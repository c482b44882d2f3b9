"""What is told about the daemon's work: log lines and figures."""
