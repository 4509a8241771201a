"""Routed experts: grouped problems, how tokens are routed, exact data, and what runs them."""
