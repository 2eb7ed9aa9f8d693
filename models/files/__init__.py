"""Files as people's file systems keep them: written whole or not at all, locked where that is possible.

A local disk can do all that is asked here. A network or an object store may have no locks, no flush of a folder and no
renaming of one; disks are full, quotas used up, folders read-only. What can be done without is done without, and
everything else becomes one sentence. Needs nothing but the standard library.
"""
