"""The training package of CoPeDiT."""
