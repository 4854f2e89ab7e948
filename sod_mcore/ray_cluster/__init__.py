"""What rollouts and engines both need to use a Ray cluster that somebody else has started."""
