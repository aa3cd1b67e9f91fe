"""The world of one expert group and its process groups."""
