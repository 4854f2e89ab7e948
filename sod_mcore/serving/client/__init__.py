"""How requests reach the engines of a model: chosen, retried, hedged, and read back as arrays."""
