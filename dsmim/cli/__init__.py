"""The commands: `dsmim --help`. No heavy package is imported before a command runs."""
