"""One request from image bytes to answer: admission, decoding, inference, account. Knows nothing of HTTP."""
