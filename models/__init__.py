"""What a CLIP tower, a Cross-Layer Transcoder (CLT), a ledger and a bundle *are*.

Shared by the two sides of the house: `training` (offline) and `service` (online) import from here and never
from each other. `models.account.ledger` and `models.bundle.bundle` need numpy and pydantic alone; the rest needs torch.
"""
