"""Choices made public, kept in line with what is here, and taken back."""
