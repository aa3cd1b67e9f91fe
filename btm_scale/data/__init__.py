"""Text into tokens, and tokens into training batches and evaluation text."""
