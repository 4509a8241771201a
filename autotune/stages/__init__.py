"""The stages of a probe, one entry each; none imports another."""
