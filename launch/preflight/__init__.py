"""A study compiled for chips that are not here: ``run.preflight`` does it, the other files are its parts."""
