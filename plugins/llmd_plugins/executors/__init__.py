"""Ways to drive the device."""
