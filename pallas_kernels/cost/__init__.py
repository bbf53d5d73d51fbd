"""What a kernel computes and moves, as formulas: pure Python, for the compiler's estimates and the ledger."""
