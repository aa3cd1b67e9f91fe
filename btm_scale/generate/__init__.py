"""Text from the forest: prompts in, continuations out."""
