"""The expert set: its members, their scores, and what is made of them."""
