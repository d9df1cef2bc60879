"""Models and tokenizers as a recipe names them: loaded, adapted, packed."""
