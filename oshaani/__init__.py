"""The application shell: settings, wiring, command line."""

from __future__ import annotations

import sys
from pathlib import Path

__version__ = "0.1.0"

_BUNDLE = Path(__file__).parent / "_app"
if _BUNDLE.is_dir() and str(_BUNDLE) not in sys.path:
    # Installed from a wheel: the layers lie in a private folder, see pyproject.toml.
    sys.path.insert(0, str(_BUNDLE))
