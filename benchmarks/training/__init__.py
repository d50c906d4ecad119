"""Cost and benefit of training an expanded network."""
