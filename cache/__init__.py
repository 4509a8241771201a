"""Remembers: evidence in ledger.db, choices in choices.db, and how both are read."""
