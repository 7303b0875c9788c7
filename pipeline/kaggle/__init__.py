"""Checks before a submission is sent, sending it, and the ledger of all that were sent."""
