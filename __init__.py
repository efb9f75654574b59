"""isofold."""
