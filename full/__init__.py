"""What only the full configuration needs: PixArt's weights and encoders, renders on disk, latents, photographs."""
