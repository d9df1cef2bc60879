"""A finished run among people: talk to it, serve it, let people vote on its replies."""
