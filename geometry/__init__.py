"""Surfaces and cameras: meshes, silhouettes, textures, files. Nothing here knows of diffusion or of the toy world."""
