"""The process that runs one backend: its protocol, its supervisor, what it does."""
