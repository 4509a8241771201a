"""Runs backends and returns evidence. Knows nothing of SQLite."""
