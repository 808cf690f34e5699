"""The study: `python -m lavin.recipes.eim`."""

from .study import main


if __name__ == "__main__":
    main()
