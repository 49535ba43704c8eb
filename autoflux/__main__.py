"""`python -m autoflux`."""

from autoflux.cli.main import main

if __name__ == "__main__":
    main()
