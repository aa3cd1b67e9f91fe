"""Generate text from a forest."""
