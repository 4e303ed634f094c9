"""`python -m modeling_vitreg` is `vitreg`."""

from modeling_vitreg.cli import app
from modeling_vitreg.cli.processes import start_the_others


if __name__ == "__main__":
    start_the_others()
    app()
