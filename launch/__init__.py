"""How and where cells run; the command line."""
