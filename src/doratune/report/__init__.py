"""One HTML page about training runs, with everything it needs inside: settings, curves, scores, costs, movement, samples.

page.py       runs → one file
page.html     its template
page.css      how it looks
page.js       its charts
read.py       a run's folder; what is missing or broken is a warning
settings.py   what runs share, and which may stand in one table
overview.py   how runs ended, what they cost
scores.py     accuracy with intervals
points.py     ΔM and ΔD: measured, or from doratune analyze
samples.py    outputs before and after
tables.py     what a table is
"""
