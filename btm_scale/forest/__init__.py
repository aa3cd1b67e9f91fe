"""The expert set: its members, their scores, and the methods that combine them."""
