"""Feature cards (`vitrine cards`): what every feature of a CLT, or of residual SAEs, fires on.

    vocabulary    candidate words for labels, and their embeddings
    dictionary    the CLT or the SAEs, by one protocol
    survey        a single pass over the images: counts, exemplars, codes; bounded memory, resumable
    labels        choosing words for features, or abstaining
    quality       whether a label predicts on which held-out images its feature fires
    coactivity    features that fire together
    pictures      small pictures of the model's inputs
    build         the whole pipeline: from a checkpoint, its bundle and its data to a bundle with cards

Tables: `models.bundle.cards`.

L layers, F features per layer, B images of a batch, T tokens, P patches, D embedding size.
"""
