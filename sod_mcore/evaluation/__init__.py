"""How good a model is on held-out problems, through the same rollouts as in training."""
