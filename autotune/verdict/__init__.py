"""From evidence to verdicts. Pure: rows in, rows out."""
