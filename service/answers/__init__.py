"""One request from image bytes to answer: admission, decoding, inference, account. Independent of HTTP."""
