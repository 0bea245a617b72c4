"""`python -m moesaic` is `moesaic`."""

from __future__ import annotations

from moesaic.cli.app import main

if __name__ == "__main__":
    main()
