"""The stand-in world: procedural objects, their photographs and renders, and what is trained on them alone."""
