"""The contract's shapes: what a request may ask and what an answer holds. Also the OpenAPI document's source."""
