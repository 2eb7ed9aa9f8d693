"""A spurious cue found in a deployed model, and an edit proposed that takes it out: `vitrine debias`.

errors.py         what cannot be debiased, and why
table.py          a CSV of images with label, group and split
examples.py       images, labels, groups and the two halves: one proposes, the other decides
pictures.py       their pixels, decoded once
cue.py            groups without a column of them: by a cue in words, or by what moves the errors
contributions.py  what every feature gave to one label rather than another, or along a direction, image by image
ranking.py        features that tell the groups apart within a class, but not the class within a group
directions.py     in which the groups' streams differ
runner.py         predictions under an edit
candidates.py     edits that may be proposed, of features or directions
search.py         the edit chosen on the first half
projections.py    label embeddings projected off the cue's prompts: Orth-Proj, Orth-Cali
report.py         what was found, as it is written
printing.py       and as it is printed
run.py            all of it, one after the other
"""
