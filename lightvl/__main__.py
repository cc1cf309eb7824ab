"""`python -m lightvl` is the `lightvl` command."""

from lightvl.cli import main

if __name__ == "__main__":
    main()
