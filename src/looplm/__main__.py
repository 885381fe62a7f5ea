"""`python -m looplm` is `looplm`."""

from looplm.cli.main import main

if __name__ == "__main__":
    main()
