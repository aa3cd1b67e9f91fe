"""Merging: methods, planning, workers, and the journal from which a merge resumes."""
