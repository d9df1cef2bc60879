"""Rows of any layout → pairs with a prompt, every dropped row with its reason."""
