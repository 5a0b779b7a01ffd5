"""One HTML page about training runs, with everything it needs inside: settings, curves, scores, costs, movement, samples."""
