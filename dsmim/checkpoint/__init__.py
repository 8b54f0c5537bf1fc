"""Saving, finding and resuming checkpoints, also at another world size or ZeRO stage."""
