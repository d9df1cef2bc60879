"""What people read: foreign text made safe, estimates with their error, tables."""
