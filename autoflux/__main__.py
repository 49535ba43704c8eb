"""`python -m autoflux`, and the `autoflux` program: what must be done before anything slow is imported."""

import os
from typing import NoReturn

from autoflux.cli import interrupt


def main() -> NoReturn:
    """Take Ctrl-C over, settle how torch allocates memory here and in all processes started here, run the command."""
    interrupt.install()
    from autoflux.runtime import allocator  # noqa: PLC0415 — after Ctrl-C

    allocator.apply(os.environ)
    from autoflux.cli.main import main as run  # noqa: PLC0415 — imports click and rich

    run()


if __name__ == "__main__":
    main()
