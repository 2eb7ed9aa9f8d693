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
    "Cross-Layer Transcoder (CLT)": "Sparse stand-ins for all MLPs of a transformer at once. The code z_i of source "
    "layer i is made from what MLP i reads, and adds to the output of every MLP from i on: y_j = b_j + Σ z_i W(i→j).",
    "R²": "1 − Σ|y − y′|² / Σ|y − mean y|², over tokens and dimensions, for the MLP's output y and the CLT's y′; [CLS] "
    "and patches about their own means. A CLT's R² is the mean over layers.",
    "Outlier tokens, R² kept": "An outlier's MLP output is longer than three times the median of its layer's tokens. "
    "In pretrained ViTs a few are a hundred times as long: they own the variance, and R² with them says little about "
    "the others. R² kept: over the other tokens, about their own mean.",
    "Relative error": "Median over tokens of |y − y′|/|y|.",
    "L0, dead features": "Active features a token; share of features that fired for no token measured here.",
    "Cascaded replacement": "The MLPs of a window of layers are replaced by the CLT, and every later layer reads the "
    "replaced stream. Layers before the window read CLIP's own stream and still write into the window.",
    "Divergence": "Kullback-Leibler, of the zero-shot distribution over the labels from CLIP's own; mean over images.",
    "Contribution score C(i→j)": "Mean over tokens of ⟨c, y⟩/|y|² with c = z_i W(i→j) and y = Σ c over i ≤ j, without "
    "the bias. Centred: c and y less their means over the data set, by pair of layers and token type.",
    "Drop and keep": "The last MLP's output at [CLS] is the bias and what some source layers write, on CLIP's own "
    "stream. Dropped layers are left out; kept ones alone are left in.",
    "Insertion and deletion": "Each image's active features, over all tokens, are ranked and set to their means (over "
    "the val images, at [CLS] and at patches) in the running network: the difference they would have written is added, "
    "the true MLPs go on. Deletion: the best-ranked at their means. Insertion: all others. Images that CLIP classifies "
    "rightly, where that is known. Area: mean of the curve over the fractions as listed; low is good for deletion, "
    "high for insertion.",
    "Rankings of features": "For the top-1's logit less the mean over labels. Sources: z⟨W, G⟩, G the gradient at what "
    "each MLP wrote, back through attention alone with its weights and LayerNorms' denominators held fast; about the "
    "mean: (z − mean z)⟨W, G⟩ over all tokens. Direct: what a feature writes at [CLS], straight to the logit. "
    "Gradient × activation: the true gradient, through MLPs, attention and norms, in place of G. Activation: z summed "
    "over tokens.",
    "Retrieval": "Cosine of the sparse codes at [CLS] of one layer; the query itself is left out.",
    "Intervals": "Percentile bootstrap over images, 95 %. All figures share the resamples, so that differences are "
    "paired by image.",
    "The paper's figures": "arXiv 2604.13304, CLIP B/32 and B/16 on CIFAR-100, COCO and ImageNet-100: lowest to "
    "highest of its cells, for its own CLIPs and data. Accuracies under replacement and R² were read off its charts.",
}
SAE_SECTIONS = {
    **{name: SECTIONS[name] for name in ("reconstruction", "replacement", "nodes")},
    "levels": "From low to high level",
    "beside": "Beside a Cross-Layer Transcoder",
    **{name: SECTIONS[name] for name in ("provenance", "definitions")},
}
SAE_DEFINITIONS = {
    "Residual SAEs": "Sparse autoencoders of the residual stream, one after every block but the last. A token x is "
    "standardised by its own mean and deviation, x′ = (x − m)/s; z = φ(W x′ + b), and the SAE's version is "
    "(z V + c) s + m, with rows of V of length 1.",
    "Fraction of variance explained": "1 − Σ|x − x̂|² / Σ|x − mean x|², over tokens and dimensions; [CLS] and patches "
    "about their own means. Of standardised tokens, which is what the SAEs are trained on, and of the raw stream, in "
    "which a few massive tokens may own the variance. Without outliers: tokens not longer than three times the median "
    "of their layer's tokens, about their own mean.",
    "Relative error": "Median over tokens of |x′ − x̂′|/|x′|.",
    "Replacement": "The stream after a block is its SAE's version of it. In a window every later block, and SAE, reads "
    "what those before it made.",
    "Nodes": "A feature of a layer, over all tokens, or the error that its SAE leaves there: the paper's nodes. Token "
    "by token: each feature, and error, at one token. Neurons: a channel of the stream after a block, over all tokens. "
    "Active: features that fire in the image, and all errors and neurons.",
    "Insertion and deletion": "Each image's active nodes are ranked and set to their medians (by token, over train "
    "images) in the running network: later blocks, and SAEs, read the edited stream; errors stay unless their node is "
    "set. Deletion: the best-ranked at their medians. Insertion: all nodes but the best-ranked, silent ones too. "
    "Images that CLIP classifies rightly, where that is known. Area: mean of the curve over the fractions as listed, "
    "equally spaced; low is good for deletion, high for insertion. Regain: with the best-ranked 2 % inserted, the "
    "share of the way from all nodes at their medians to none.",
    "Rankings of nodes": "For the top-1's logit less the mean over labels. Relevance: (z − median) times the gradient "
    "at z, summed over tokens, with LayerNorms' denominators, attention's weights, the MLPs' gates and the logit's "
    "divisor held fast (LibraGrad), and errors being leaves, through which no gradient goes on. Through errors: it "
    "does. Nothing held fast: the plain gradient, errors being leaves. Gradient × activation: z times CLIP's own "
    "gradient. Activation: z, and of an error its length in units of the tokens' deviations. Neurons: the stream's "
    "channels less their medians, times LibraGrad's gradient.",
    "What features answer to": "At patches, of features that fire in 16 images or more. Position: share of the "
    "activation's variance that a patch's place explains. Class: share of the variance of an image's mean activation "
    "that its class explains. Colour: share of the activation's variance that a patch's mean colour explains linearly. "
    "Purity: of the 16 images in which the feature is strongest, the share of the commonest class. Fires: share of all "
    "patches. Spread: share of an image's patches, where it fires at any. Evenness: (Σz)²/(P Σz²) over an image's P "
    "patches.",
    "Shuffled, untrained, neurons": "Shuffled: the same figures with places permuted within each image, and the class "
    "and colours of another image. Untrained: SAEs of the same shape at their first weights. Neurons: channels of the "
    "standardised stream, which fire everywhere.",
    "Beside a Cross-Layer Transcoder (CLT)": "A CLT stands in for the MLPs: y_j = b_j + Σ z_i W(i→j), its features are "
    "set to their means over the same train images, and its account is the source account, back through attention "
    "alone. R² is each dictionary's own, of the standardised stream, or of MLP outputs. Everything replaced: the "
    "stream after every block but the last, or every MLP. Nodes that regain 80 %: on the line between measured "
    "fractions. Circuits: as they are served, expanded from the logit and pruned by circuit-tracer's rules; nodes are "
    "features, and errors, at one token, and embeddings. Replacement score: influence from embeddings ÷ (embeddings + "
    "errors). Completeness: share of what flows into nodes, by influence, that no error made.",
    **{name: DEFINITIONS[name] for name in ("L0, dead features", "Divergence", "Intervals")},
}
