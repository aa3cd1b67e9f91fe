"""Branch-Train-Merge (arXiv 2208.03306): train, ensemble and merge domain-expert language models."""

import logging

__version__ = "0.2.0"

# A program that imports btm_scale decides what becomes of its messages.
logging.getLogger(__name__).addHandler(logging.NullHandler())
