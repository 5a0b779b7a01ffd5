"""A fair comparison of methods on one's own data: the same recipe, data and seeds, a learning-rate sweep of the same size for
each method on a validation split, several seeds, intervals, paired tests, and the cost beside the score.

    recipe.py       CompareRecipe; the methods' names
    cells.py        which runs a grid has, each as a command
    rates.py        the learning rate that each method's sweep chose
    grid.py         base, sweep, final cells, going on after a stop
    launch.py       one after the other, or on a Ray cluster
    collect.py      what finished runs say
    statistics.py   intervals over seeds, paired bootstrap
    summary.py      tables, and who is ahead in words
"""
