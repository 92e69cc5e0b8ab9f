"""Checkpoints in the format `checkpoint/1`: written by every rank, read at any world size."""
