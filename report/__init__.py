"""What people see, on a terminal, as a page and as JSON. Reads rows and decides nothing."""
