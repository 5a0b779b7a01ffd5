"""Results that travel: what a folder says about itself, and the way to a model hub.

card.py   README.md of an adapter or a model: base, data, settings, figures, scores, versions, how to load it
push.py   a folder as a repository of a hub, private unless asked otherwise
"""
