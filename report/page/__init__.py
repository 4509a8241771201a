"""The page to look at: what a node or a fleet knows, as one HTML file that needs nothing else."""
