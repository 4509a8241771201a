"""Chains of GEMMs as an MLP runs them."""
