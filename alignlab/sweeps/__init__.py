"""One recipe, many settings: its members, the runner that trains them one after another, and the choice among them."""
