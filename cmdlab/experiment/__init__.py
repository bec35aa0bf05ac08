"""One measured run, from a corpus and a recipe to a folder."""
