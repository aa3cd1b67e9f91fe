"""Runs that are tested as they stand."""

from pathlib import Path

FOLDER = Path(__file__).parent
