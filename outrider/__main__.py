"""`python -m outrider`: the command line, where no script of its name is on PATH."""

from outrider.cli.main import main

if __name__ == "__main__":
    main()
