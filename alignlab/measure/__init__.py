"""What a model makes of texts, as numbers with their error."""
