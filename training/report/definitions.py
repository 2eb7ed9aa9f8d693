"""The report's sections, and what its words mean."""

SECTIONS = {
    "reconstruction": "Reconstruction",
    "replacement": "Replacement",
    "contributions": "Contributions",
    "faithfulness": "Faithfulness",
    "nodes": "Insertion and deletion",
    "retrieval": "Retrieval",
    "provenance": "What was measured",
    "definitions": "Definitions",
}
DEFINITIONS = {
    "Cross-Layer Transcoder (CLT)": "A sparse replacement for all MLPs of a transformer. The code z_i of source layer "
    "i is computed from the input of MLP i, and adds to the output of every MLP from layer i on: y_j = b_j + Σ z_i "
    "W(i→j).",
    "R²": "1 − Σ|y − y′|² / Σ|y − mean y|², over tokens and dimensions, where y is the MLP's output and y′ the CLT's; "
    "for [CLS] and for patches, relative to their own means. A CLT's R² is the mean over layers.",
    "Outlier tokens, R² kept": "A token is an outlier if its MLP output is longer than three times the median of its "
    "layer's tokens. In pretrained ViTs a few tokens are a hundred times as long: they dominate the variance, and R² "
    "with them says little about the others. R² kept: over the other tokens, relative to their own mean.",
    "Relative error": "Median over tokens of |y − y′|/|y|.",
    "L0, dead features": "Active features per token; share of features that fired for no token measured here.",
    "Cascaded replacement": "The MLPs of a window of layers are replaced by the CLT, and every later layer reads the "
    "resulting stream. Layers before the window read CLIP's own stream, and their features still write into the "
    "window.",
    "Divergence": "Kullback-Leibler divergence of the zero-shot distribution over the labels from CLIP's own "
    "distribution; mean over images.",
    "Contribution score C(i→j)": "Mean over tokens of ⟨c, y⟩/|y|², where c = z_i W(i→j) and y = Σ c over i ≤ j, "
    "without the bias. Centred: after subtracting from c and y their means over the data set, by pair of layers and "
    "token type.",
    "Drop and keep": "The last MLP's output at [CLS] is computed as the bias plus what some source layers write, on "
    "CLIP's own stream. Drop: the named layers are left out. Keep: only the named layers are used.",
    "Insertion and deletion": "Each image's active features, over all tokens, are ranked, and some are set to their "
    "means (over the val images, at [CLS] and at patches) in the running network: the resulting difference in what "
    "they write is added, and the true MLPs continue to run. Deletion: the best-ranked features are set to their "
    "means. Insertion: all others are. Only images that CLIP classifies correctly, if that is known. Area: mean of the "
    "curve over the listed fractions; low is good for deletion, high for insertion.",
    "Rankings of features": "For the top-1's logit minus the mean over labels. Sources: z⟨W, G⟩, where G is the "
    "gradient at what each MLP wrote, passed back only through attention, with attention's weights and the LayerNorms' "
    "denominators held constant; about the mean: (z − mean z)⟨W, G⟩ over all tokens. Direct: what a feature writes at "
    "[CLS], directly to the logit. Gradient × activation: the true gradient, through MLPs, attention and norms, "
    "instead of G. Activation: z summed over tokens.",
    "Retrieval": "Cosine of the sparse codes at [CLS] of one layer; the query itself is excluded.",
    "Intervals": "Percentile bootstrap over images, 95 %. All figures use the same resamples, so that differences are "
    "paired by image.",
    "The paper's figures": "arXiv 2604.13304, CLIP B/32 and B/16 on CIFAR-100, COCO and ImageNet-100: lowest to "
    "highest of its experiments, for its own CLIPs and data. Accuracies under replacement and R² were read off its "
    "charts.",
}
SAE_SECTIONS = {
    **{name: SECTIONS[name] for name in ("reconstruction", "replacement", "nodes")},
    "levels": "From low to high level",
    "beside": "Comparison with a Cross-Layer Transcoder",
    **{name: SECTIONS[name] for name in ("provenance", "definitions")},
}
SAE_DEFINITIONS = {
    "Residual SAEs": "Sparse autoencoders of the residual stream, one after every block except the last. A token x is "
    "standardised by its own mean and deviation, x′ = (x − m)/s; its code is z = φ(W x′ + b), and its reconstruction "
    "is (z V + c) s + m, where the rows of V have length 1.",
    "Fraction of variance explained": "1 − Σ|x − x̂|² / Σ|x − mean x|², over tokens and dimensions; for [CLS] and for "
    "patches, relative to their own means. For standardised tokens, on which the SAEs are trained, and for the raw "
    "stream, in which a few massive tokens can dominate the variance. Without outliers: only tokens that are not "
    "longer than three times the median of their layer's tokens, relative to their own mean.",
    "Relative error": "Median over tokens of |x′ − x̂′|/|x′|.",
    "Replacement": "The stream after a block is replaced by its SAE's reconstruction. In a window, every later block "
    "and SAE reads the stream that results from the earlier replacements.",
    "Nodes": "A feature of a layer, over all tokens, or the error that its SAE leaves there: these are the paper's "
    "nodes. Token by token: each feature and each error at one token. Neurons: a channel of the stream after a block, "
    "over all tokens. Active: features that fire in the image, and all errors and neurons.",
    "Insertion and deletion": "Each image's active nodes are ranked, and some are set to their medians (by token, over "
    "train images) in the running network: later blocks and SAEs read the edited stream; an error changes only if its "
    "node is set. Deletion: the best-ranked nodes are set to their medians. Insertion: all nodes except the "
    "best-ranked are, including features that do not fire. Only images that CLIP classifies correctly, if that is "
    "known. Area: mean of the curve over the listed fractions, equally spaced; low is good for deletion, high for "
    "insertion. Regain: with the best-ranked 2 % inserted, the share that is closed of the gap between the logit with "
    "all nodes at their medians and the logit with none.",
    "Rankings of nodes": "For the top-1's logit minus the mean over labels. Relevance: (z − median) times the gradient "
    "at z, summed over tokens, with LayerNorms' denominators, attention's weights, the MLPs' gates and the logit's "
    "divisor held constant (LibraGrad), and with errors as leaves, through which no gradient passes. Through errors: "
    "the gradient passes through them. Nothing held constant: the plain gradient, with errors as leaves. Gradient × "
    "activation: z times CLIP's own gradient. Activation: z, and for an error its length in units of the tokens' "
    "deviations. Neurons: the stream's channels minus their medians, times LibraGrad's gradient.",
    "What features respond to": "At patches, for features that fire in 16 images or more. Position: share of the "
    "activation's variance that a patch's place explains. Class: share of the variance of an image's mean activation "
    "that its class explains. Colour: share of the activation's variance that a patch's mean colour explains linearly. "
    "Purity: share of the commonest class among the 16 images in which the feature is strongest. Fires: share of all "
    "patches at which it fires. Spread: the same share within an image in which it fires. Evenness: (Σz)²/(P Σz²) over "
    "an image's P patches.",
    "Shuffled, untrained, neurons": "Shuffled: the same figures with places permuted within each image, and with the "
    "class and colours of another image. Untrained: SAEs of the same shape with their initial weights. Neurons: "
    "channels of the standardised stream, which fire everywhere.",
    "Comparison with a Cross-Layer Transcoder (CLT)": "A CLT replaces the MLPs: y_j = b_j + Σ z_i W(i→j). Its features "
    "are set to their means over the same train images, and its account is the source account, followed back only "
    "through attention. R²: each dictionary's own, of the standardised stream or of MLP outputs. Everything replaced: "
    "the stream after every block except the last, or every MLP. Nodes that regain 80 %: interpolated linearly between "
    "measured fractions. Circuits: as they are served, expanded from the logit and pruned by circuit-tracer's rules; "
    "nodes are features and errors at one token, and embeddings. Replacement score: influence from embeddings ÷ "
    "(embeddings + errors). Completeness: share of what flows into nodes, weighted by influence, that does not come "
    "from errors.",
    **{name: DEFINITIONS[name] for name in ("L0, dead features", "Divergence", "Intervals")},
}
