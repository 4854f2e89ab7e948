"""How good the student is on held-out problems, through the same rollouts as in training."""
