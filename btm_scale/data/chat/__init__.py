"""Conversations: their rows, chat templates, which tokens are answers, and packing."""
