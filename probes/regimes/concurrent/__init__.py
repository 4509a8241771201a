"""Several launches at once: streams, threads, other processes."""
