"""`python -m jebm COMMAND …`, the same as `jebm COMMAND …`."""

from jebm.commands import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
