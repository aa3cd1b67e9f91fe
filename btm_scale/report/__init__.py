"""The results for people: tables, progress and one page."""
