"""Rows for SFT from a model's own traces: drawn, verified, filtered, and written with where they come from."""
