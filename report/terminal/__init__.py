"""What a terminal shows: tables, explanations, progress."""
