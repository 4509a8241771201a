"""Races under programmatic dependent launch, made to happen in every launch."""
