"""The bundled worlds, scenes and crowds, with exact truth."""
