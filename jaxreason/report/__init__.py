"""Figures, tables and pages from the files of runs; the loops know nothing of it."""
