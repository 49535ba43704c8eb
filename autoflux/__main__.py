"""`python -m autoflux`, and the `autoflux` program: takes Ctrl-C over before anything slow is imported."""

from typing import NoReturn

from autoflux.cli import interrupt


def main() -> NoReturn:
    """Run the command line."""
    interrupt.install()
    from autoflux.cli.main import main as run  # noqa: PLC0415 — imports click and rich

    run()


if __name__ == "__main__":
    main()
