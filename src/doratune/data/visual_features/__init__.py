"""Features of what image and video tasks look at: made once by an image tower, and read from one file ever after.

settings.py   which tower, how many cells and frames, in which folder
pictures.py   an image, the frames of a video file or of a folder
store.py      the file: one row a sight, whole or not there
extract.py    items → file, in batches, going on where it was stopped
"""
