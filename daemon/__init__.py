"""What stays on a node: sees what evidence has gone stale, probes again when a GPU is free, answers
over HTTP, and tells systemd. Imports no torch: probes and publications are child processes."""
