"""Routed experts of libraries, one module a provider."""
