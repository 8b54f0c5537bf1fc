"""What speaks to a scheduler. Imports nothing of dsmim but the words for errors."""
