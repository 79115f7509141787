"""Where training images come from: anatomies, phantoms, simulated and real studies."""
