"""Readers of the formats of text: one file per format, and one that senses which it is."""
