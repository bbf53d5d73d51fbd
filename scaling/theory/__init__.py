"""Learning problems whose scaling laws are known exactly: what the whole path is checked against."""
