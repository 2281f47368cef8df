"""How the models of this repository were trained; not part of the package, see README.md."""
