"""Everything that turns the bytes of an image file into pixels: the same everywhere, in training and in the service.

errors.py   why a file is refused
formats.py  which formats are read, and how they are told
parts.py    how many parts a file may have
png.py      a PNG without the chunks that decide nothing
jpeg.py     segments, scans, a missing end, reduced sizes
colour.py   every mode as RGB: 16 bits, transparency, what has no white
decode.py   from bytes to an upright RGB picture, with notes of what was done to it
frame.py    from the picture to the numbers that the CLIP takes
"""
