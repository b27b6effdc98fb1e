"""What knows nothing of diffusion: files, pictures, launching, random numbers."""
