"""``python -m kempnerforge`` is the console script ``kempnerforge``."""

from kempnerforge.cli.main import main

if __name__ == "__main__":
    main()
