"""`python -m oshaani` is the command `oshaani`."""

from __future__ import annotations

from oshaani.cli import main

if __name__ == "__main__":
    main()
