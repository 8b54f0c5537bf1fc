"""Read weights from other projects' files into dsmim's models, and write dsmim's weights in their formats."""
