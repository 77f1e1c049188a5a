"""`python -m convattn`: the command line without its entry point."""

from convattn.cli import main

if __name__ == "__main__":
    main()
