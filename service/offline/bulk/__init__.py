"""Many images through the engine, without a server: `vitrine bulk`. Files in, Parquet tables out.

    errors.py      options or output that cannot be used
    job.py         the definition of a run, stored beside its output; a resume with other options is refused
    tables.py      rows and errors, and how a part of them is written atomically
    work.py        the pipeline: decode in processes, infer in batches, account in threads, write
    ray_engine.py  the same pipeline in several processes, by Ray Data
    ray_alone.py   the environment of a Ray of this machine alone
    run.py         a run from end to end, with a progress bar

The inputs (`models.inputs`) are a numbered list, cut into parts of fixed size. A part is done when its file exists, so
a run that was killed resumes with its unfinished parts, and no image is lost or answered twice.
"""
