"""What a probe writes and what earlier ones left: recorder, earlier failures, method."""
