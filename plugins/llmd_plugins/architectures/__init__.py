"""Model architectures, and the decoder that they share."""
