"""The reference pages that follow from the program: `python -m oshaani.reference` writes them into `docs/reference`.

A test compares what is written with what the program says, so no page can go stale.
"""
