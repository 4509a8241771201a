"""What is launched and what came of it: cases, outcomes, timing."""
