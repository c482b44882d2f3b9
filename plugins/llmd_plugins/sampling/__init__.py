"""Samplers and logits processors."""
