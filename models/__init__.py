"""Definitions of a CLIP tower, a Cross-Layer Transcoder (CLT), a ledger and a bundle.

`training` (offline) and `service` (online) both import from here and never from each other.
`models.account` and `models.bundle` need only numpy and pydantic; the rest needs torch.
"""
