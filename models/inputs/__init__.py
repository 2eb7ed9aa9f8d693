"""Everything that finds images in folders, lists, tars and Parquet files: for bulk, replay and training alike.

    errors.py      inputs that cannot be used, an image that cannot be read
    names.py       what is an image by its name, what is litter; first bytes
    files.py       one regular file, read without ever waiting; names as valid text
    skipped.py     what was left out: how many, why, and the first names
    folder.py      a folder at any depth, links followed, loops guarded
    pattern.py     braces and globs
    lists.py       text files with an entry a line: paths, or names such as labels
    streams.py     a tar's bytes, compressed or not, in one direction
    tar.py         the members of a tar
    places.py      where the images in a tar are, links resolved
    shards.py      the images in tars, read
    webdataset.py  members of a tar as samples: key and extension
    duck.py        DuckDB, where neither paths nor the network touch the data
    parquet.py     the rows of Parquet files, every row group decoded once
    source.py      a numbered list of images, and its one reader
    classes.py     one folder a class
    imagenet.py    ImageNet's classes by their WordNet ids, which such folders are named by
    opening.py     what a command line names

An image has the same number in every run on the same inputs, and nothing is left out without being counted and named.
"""
