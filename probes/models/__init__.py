"""Models and checkpoints: the layers they bring, and whether their weights are sound."""
