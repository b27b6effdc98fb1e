"""Two related systems on the same DiT: RefAny3D in one file, CAD and what it is compared with in the others."""
