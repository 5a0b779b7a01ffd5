"""A fair comparison of methods on one's own data: the same recipe, data and seeds, a learning-rate sweep of the same size for
each method on a validation split, several seeds, intervals, paired tests, and the cost beside the score."""
