"""How good a trained network is, and what it says of new images."""
