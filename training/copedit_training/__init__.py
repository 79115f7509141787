"""Training of both stages, evaluation and the embedded phantom."""
