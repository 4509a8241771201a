"""From verdicts and times to choices. Pure: rows in, rows out."""
