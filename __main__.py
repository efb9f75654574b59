"""`python -m isofold` is the command `isofold`, for interpreters whose scripts are not on the path."""

from .compiler.cli import main

if __name__ == "__main__":
    main()
