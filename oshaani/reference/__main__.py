"""Write every generated page."""

from __future__ import annotations

import sys

from oshaani.reference.pages import FOLDER, written


def main() -> None:
    """Write what has changed, and say so."""
    for name, text in written().items():
        file = FOLDER / name
        if not file.exists() or file.read_text("utf-8") != text:
            file.write_text(text, "utf-8")
            sys.stdout.write(f"{file}\n")


if __name__ == "__main__":
    main()
