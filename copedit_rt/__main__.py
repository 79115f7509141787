"""`python -m copedit_rt` is the command `copedit`."""

from copedit_rt.cli import main

if __name__ == "__main__":
    main()
