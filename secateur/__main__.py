"""``python -m secateur``."""

from secateur.cli.main import main

if __name__ == "__main__":
    main()
