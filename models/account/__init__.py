"""Accounts of a logit and of the effect of removing its parts: ledger, heat map, windows of layers. numpy only."""
