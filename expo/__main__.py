"""`python -m expo` is the same program as `expo`."""

from expo.cli.program import main

if __name__ == "__main__":
    main()
