"""Many images through the engine, without a server: `vitrine bulk`. Files in, Parquet tables out.

    inputs.py      the four kinds of inputs, each as a numbered list: an image has the same number in every run
    job.py         what a run is to do, kept beside its output; a resume with other options is refused
    tables.py      rows and errors, and how a part of them comes to lie on disk whole or not at all
    work.py        the pipeline: decode in threads, infer in batches, account in threads, write
    ray_engine.py  the same pipeline in several processes, by Ray Data
    run.py         a run from end to end, with a progress bar

The inputs are cut into parts of fixed size. A part is done when its file is there, so a run that was killed is taken
up at its unfinished parts, and no image is lost or answered twice.
"""
