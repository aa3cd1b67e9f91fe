"""Branch-Train-Merge (arXiv 2208.03306): train, ensemble and merge domain-expert language models."""

__version__ = "0.2.0"
