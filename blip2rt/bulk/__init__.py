"""Whole collections: pictures from folders, tables and shards, answers to files, again and again where it was killed.

source ── items ──> journal: done already? ── decoding (processes) ──> pixel values [3, S, S]
       ── encode (a thread) ──> features ── task ──> rows ──> sink, then journal

`run.py` is where it starts. It is not imported here, because the decoding processes need none of the engines.
"""
