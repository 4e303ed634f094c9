"""`python -m modeling_vitreg` is `vitreg`."""

from modeling_vitreg.cli import app


if __name__ == "__main__":
    app()
