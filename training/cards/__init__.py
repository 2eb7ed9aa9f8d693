"""Feature cards (`vitrine cards`): what every feature of a CLT fires on.

    vocabulary    words that a feature may be labelled with, and their embeddings
    survey        the one pass over the images: counts, exemplars, codes; bounded memory, taken up after an interruption
    labels        words for features, and when to give none
    quality       whether a label tells the images on which its feature fires, on held-out ones
    coactivity    features that fire together
    pictures      what the model saw, as small pictures
    build         all of it: a checkpoint, its bundle and its data to a bundle with cards

Tables: `models.bundle.cards`. L layers, F features a layer, B images of a batch, T tokens, P patches, D embedding size.
"""
