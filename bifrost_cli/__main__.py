"""`python -m bifrost_cli` is `bifrost`."""

from __future__ import annotations

from bifrost_cli.cli.app import main

if __name__ == "__main__":
    main()
