"""`python -m llmd` is `llmd`."""

from llmd.cli import main

if __name__ == "__main__":
    main()
