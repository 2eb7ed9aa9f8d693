"""Accounts of a logit and of what its parts would change, in numpy alone: ledger, heat map, windows of layers."""
