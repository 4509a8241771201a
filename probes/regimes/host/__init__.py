"""What a backend may not make of its host: of other weights, earlier calls, and the process."""
