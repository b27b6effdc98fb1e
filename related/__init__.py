"""Two related systems on the same DiT, a file each."""
