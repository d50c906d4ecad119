"""Is every fold exact, and is anything left? Networks, random graphs, round trips, cost of surgery."""
