"""Tar shards on disk or on a server: their samples, their index files, subsets, local copies."""
