"""``fx-instrument`` and ``python -m fx_instrument``."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line; the process's exit code."""
    try:
        from .cli import run
    except ModuleNotFoundError as missing:
        if missing.name not in ("click", "rich"):
            raise
        print(
            f"fx-instrument needs the package {missing.name}: pip install 'fx_instrument[cli]'",
            file=sys.stderr,
        )
        return 4
    return run()


if __name__ == "__main__":
    sys.exit(main())
