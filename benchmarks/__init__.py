"""One benchmark per question; each prints a table and writes versioned JSON."""
