"""Decides: buckets, timing, verdicts and the fastest safe backend of each bucket."""
